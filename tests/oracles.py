"""Independent statements of the equations, and the inputs and the wrapper that several tests share."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmspatialmamba.ops import fusion_taps
from mmspatialmamba.ops.compat import VERSION
from mmspatialmamba.ops.library import REFERENCES
from torch import nn

SEQUENCE_LENGTHS = (1, 2, 3, 15, 16, 17, 53)
"""1, 2, 3, block - 1, block, block + 1, 3 block + 5, for a block of 16 tokens."""

GRIDS = ((1, 1), (1, 2), (3, 1), (1, 17), (19, 1), (4, 5), (11, 6), (7, 13))
"""Grids (H, W): single tokens and lines, smaller and larger than the fusion's radius, H != W."""


def scan_loop(u, delta, A, B):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, token by token."""
    state = torch.zeros_like(u[:, 0])
    states = []
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t] * A) * state + delta[:, t] * B[:, t] * u[:, t]
        states.append(state)
    return torch.stack(states, 1)


def fusion_convolutions(h, kernels, alpha, padding='replicate'):
    """Sum of three dilated depthwise convolutions, each times its alpha."""
    x = h.permute(0, 3, 1, 2)
    total = 0
    for scale, kernel, dilation in zip(alpha, kernels, (1, 3, 5), strict=True):
        padded = F.pad(x, [dilation] * 4, mode=padding)
        total = total + scale * F.conv2d(padded, kernel, groups=x.shape[1], dilation=dilation)
    return total.permute(0, 2, 3, 1)


def ssm_loop(u, dt, B, C, dt_weight, dt_bias, A, D, kernels, alpha):
    """The whole core from the two oracles above."""
    delta = torch.log1p(torch.exp(dt @ dt_weight.T + dt_bias))
    grid = u.shape[1:3]
    h = scan_loop(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2)).unflatten(1, grid)
    return fusion_convolutions(h, kernels, alpha) * C + D * u


VISITS = {
    'rows': lambda H, W: [(i, j) for i in range(H) for j in range(W)],
    'columns': lambda H, W: [(i, j) for j in range(W) for i in range(H)],
    'rows_backwards': lambda H, W: [(i, j) for i in reversed(range(H)) for j in reversed(range(W))],
    'columns_backwards': lambda H, W: [(i, j) for j in reversed(range(W)) for i in reversed(range(H))],
    'rows_snake': lambda H, W: [(i, W - 1 - j if i % 2 else j) for i in range(H) for j in range(W)],
    'columns_snake': lambda H, W: [(H - 1 - i if j % 2 else i, j) for j in range(W) for i in range(H)],
}
"""The positions (row, column) in each order."""


def orders_loop(u, dt, B, C, dt_weight, dt_bias, A, D, orders):
    """Sum over the orders of the scan, position by position along each, all states of a channel at once."""
    y = u * D.sum(0)
    for k, name in enumerate(orders):
        state = torch.zeros_like(u[:, 0, 0, :, None] * A[k])
        observed = {}
        for i, j in VISITS[name](*u.shape[1:3]):
            delta = torch.log1p(torch.exp(dt[:, i, j, k] @ dt_weight[k].T + dt_bias[k]))[..., None]
            state = torch.exp(delta * A[k]) * state + delta * B[:, i, j, k, None] * u[:, i, j, :, None]
            observed[i, j] = (state * C[:, i, j, k, None]).sum(-1)
        rows = [torch.stack([observed[i, j] for j in range(u.shape[2])], 1) for i in range(u.shape[1])]
        y = y + torch.stack(rows, 1)
    return y


def scan_inputs(length, channels=5, batch=2, dtype=torch.float64, seed=0):
    """u, delta, A, B of `scan_states`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    delta = F.softplus(normal(batch, length, channels))
    return normal(batch, length, channels), delta, -torch.exp(normal(channels)), normal(batch, length, 1)


def fusion_weights(channels, dtype=torch.float64, seed=0):
    """Three kernels and alpha of the state fusion."""
    generator = torch.Generator().manual_seed(seed)
    kernels = [torch.randn(channels, 1, 3, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return kernels, torch.randn(3, generator=generator, dtype=torch.float64).to(dtype)


def ssm_inputs(grid, channels=5, rank=2, batch=2, dtype=torch.float64, seed=0):
    """u, dt, B, C, dt_weight, dt_bias, A, D of `structure_aware_ssm`, then kernels and alpha of its fusion.

    The maps have the given dtype; the parameters are of float32 at least, as those of a model under autocast.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=parameter_dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = (normal(batch, *grid, width, dtype=dtype) for width in (channels, rank, 1, 1))
    inputs = (
        *maps,
        normal(channels, rank),
        normal(channels),
        -torch.exp(normal(channels)),
        normal(channels),
    )
    return inputs, *fusion_weights(channels, parameter_dtype, seed + 1)


def ssm_arguments(grid, channels=5, rank=2, batch=2, dtype=torch.float64, seed=0):
    """The nine arguments of `structure_aware_ssm`."""
    inputs, kernels, alpha = ssm_inputs(grid, channels, rank, batch, dtype, seed)
    return (*inputs, fusion_taps(*kernels, alpha))


def orders_arguments(grid, channels=5, rank=2, orders=4, states=1, batch=2, dtype=torch.float64, seed=8):
    """u, dt, B, C, dt_weight, dt_bias, A, D of `selective_scan`; dtypes as those of `ssm_inputs`."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=parameter_dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    u, dt, B, C = (
        normal(batch, *grid, *sizes, dtype=dtype)
        for sizes in ((channels,), (orders, rank), (orders, states), (orders, states))
    )
    return (
        u, dt, B, C, normal(orders, channels, rank), normal(orders, channels),
        -torch.exp(normal(orders, channels, states)), normal(orders, channels),
    )  # fmt: skip


def conv_arguments(grid, channels=5, dtype=torch.float64, batch=2, seed=3):
    """x, weight, bias of `depthwise_conv`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameter_dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = normal(channels, 1, 3, 3), normal(channels)
    return normal(batch, *grid, channels).to(dtype), weight.to(parameter_dtype), bias.to(parameter_dtype)


def norm_arguments(grid, channels=5, dtype=torch.float64, batch=2, seed=4):
    """y, z, weight, bias of `gated_norm`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameter_dtype = torch.promote_types(dtype, torch.float32)
    maps = [3 * normal(batch, *grid, channels).to(dtype) for _ in range(2)]
    return *maps, normal(channels).to(parameter_dtype), normal(channels).to(parameter_dtype)


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) · weight + bias."""
    difference = x - x.mean(-1, keepdim=True)
    return difference / (difference.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def mlp_arguments(tokens, channels=5, dtype=torch.float64, hidden=None, seed=5):
    """x, norm_weight, norm_bias, weight1, bias1, weight2, bias2 of `mlp`; parameters as those of `ssm_inputs`."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    hidden = hidden or 4 * channels

    def normal(*shape, dtype=parameter_dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = 0.3 * normal(tokens, channels, dtype=dtype) + 0.1
    weight1, weight2 = normal(hidden, channels) * channels**-0.5, normal(channels, hidden) * hidden**-0.5
    return x, normal(channels), normal(channels), weight1, normal(hidden), weight2, normal(channels)


def downsample_arguments(grid, channels=12, hidden=40, batch=2, dtype=torch.float64, seed=7):
    """x, weight, bias, kernels and bias of `downsample`.

    In 16 bits the biases are far from 0, as a rounding that passes the 0 of a ReLU is a gradient more or less.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, *grid, channels), (hidden, channels), (hidden,), (hidden, 1, 3, 3), (hidden,)]
    x, weight, bias, conv_weight, conv_bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    if dtype.itemsize == 2:
        bias, conv_bias = 8 * bias.sign(), 40 * conv_bias.sign()
    return [tensor.to(dtype) for tensor in (x, weight * channels**-0.5, bias, conv_weight / 3, conv_bias)]


def layer_arguments(grid, channels=4, rank=2, batch=2, dtype=torch.float64, seed=6):
    """The fifteen arguments of `ssm_layer`, whose inner width is twice ``channels``."""
    generator = torch.Generator().manual_seed(seed)
    inner = 2 * channels
    core = ssm_arguments(grid, inner, rank, batch, dtype, seed)
    parameter_dtype = core[4].dtype

    def normal(*shape, dtype=parameter_dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(batch, *grid, channels, dtype=dtype), normal(channels), normal(channels),
        normal(2 * inner, channels) * channels**-0.5, normal(inner, 1, 3, 3) / 3, normal(inner),
        normal(rank + 2, inner) * inner**-0.5, *core[4:], normal(inner), normal(inner),
        normal(channels, inner) * inner**-0.5,
    )  # fmt: skip


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def require_grad(*tensors):
    """Leaf copies that require gradients."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def relative_error(actual, expected, scale=None):
    """Largest difference over the largest expected value, or over ``scale``."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny) if scale is None else scale
    return ((actual.to(expected.dtype) - expected).abs().max() / scale).item()


def rms_error(actual, expected, scale=None):
    """Root of the mean squared difference over that of the expected values, or over ``scale``.

    Of a whole tensor, small channels weigh little: give the tensors of one kind to it one by one.
    """
    expected = expected.double()
    scale = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny) if scale is None else scale
    return ((actual.double() - expected).square().mean().sqrt() / scale).item()


@contextmanager
def use_references():
    """Puts the references in the place of what serves the CPU."""
    library = torch.library.Library('mmspatialmamba', 'IMPL')
    for name, kernel in REFERENCES.items():
        library.impl(name, kernel, 'CPU')
    yield
    if VERSION >= (2, 4):
        library._destroy()  # older versions forget the kernels with the object
