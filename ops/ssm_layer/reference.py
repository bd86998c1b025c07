"""The state space branch and its gradients from the other ops and PyTorch's products."""

import torch

from ..depthwise_conv import split_gradient
from ..residual import add_branch, scale_gradient

OPS = torch.ops.mmspatialmamba
CONV_OPTIONS = (1, 'silu', False, False)

TOKENS_AT_ONCE = 4096
"""Tokens of a part, in inference on a CPU: few enough for its maps to stay in the cache."""


def ssm_layer_reference(
    x, norm_weight, norm_bias, eps, in_weight, x_weight, out_weight, conv_weight, conv_bias, dt_weight, dt_bias, A, D,
    taps, out_norm_weight, out_norm_bias, out_eps, scale, keep,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Computes `ssm_layer`; returns besides, if they are to be kept, the maps that backward reads."""
    if x.device.type == 'cpu' and not keep and x.shape[:-1].numel() > TOKENS_AT_ONCE:
        out = _forward_in_parts(
            x, norm_weight, norm_bias, eps, in_weight, x_weight, out_weight, conv_weight, conv_bias, dt_weight,
            dt_bias, A, D, taps, out_norm_weight, out_norm_bias, out_eps, scale,
        )  # fmt: skip
        return out, *(in_weight.new_empty(0) for _ in range(6))
    norm, mean, inverse = OPS.layer_norm(x, norm_weight, norm_bias, eps, in_weight.dtype)
    uz = norm @ in_weight.T
    before, z = uz.chunk(2, -1)
    u = OPS.depthwise_conv(before, conv_weight, conv_bias, *CONV_OPTIONS)
    steps = u @ x_weight.T
    y = OPS.structure_aware_ssm(u, *_split(steps), dt_weight, dt_bias, A, D, taps)
    branch = OPS.gated_norm(y, z, out_norm_weight, out_norm_bias, out_eps) @ out_weight.T
    kept = (norm, mean, inverse, uz, steps, y)
    return add_branch(x.contiguous(), branch, scale), *(kept if keep else [tensor.new_empty(0) for tensor in kept])


def _forward_in_parts(
    x, norm_weight, norm_bias, eps, in_weight, x_weight, out_weight, conv_weight, conv_bias, dt_weight, dt_bias, A, D,
    taps, out_norm_weight, out_norm_bias, out_eps, scale,
) -> torch.Tensor:  # fmt: skip
    """Computes the output alone, some rows at a time: of the wide maps, u and y are the only ones in memory as a whole.

    On a CPU that spares more than memory: a large new tensor costs more time to get than to fill.
    """
    N, H, W, _ = x.shape
    E = len(conv_weight)
    rows = max(1, TOKENS_AT_ONCE // (N * W))
    parts = [slice(first, min(first + rows, H)) for first in range(0, H, rows)]

    def normalize(x: torch.Tensor) -> torch.Tensor:
        return OPS.layer_norm(x, norm_weight, norm_bias, eps, in_weight.dtype)[0]

    norm = normalize(x)
    u = in_weight.new_empty(N, H, W, E)
    for part in parts:
        wider = slice(max(0, part.start - 1), part.stop + 1)  # the rows that the convolution reads
        conv = OPS.depthwise_conv(norm[:, wider] @ in_weight[:E].T, conv_weight, conv_bias, *CONV_OPTIONS)
        u[:, part] = conv[:, part.start - wider.start : part.stop - wider.start]
    del norm  # beside u and y it would be a tenth of the memory of a whole inference
    y = OPS.structure_aware_ssm(u, *_split(u @ x_weight.T), dt_weight, dt_bias, A, D, taps)
    del u
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in parts:
        z = normalize(x[:, part]) @ in_weight[E:].T
        gated = OPS.gated_norm(y[:, part], z, out_norm_weight, out_norm_bias, out_eps)
        add_branch(x[:, part], gated @ out_weight.T, scale, out[:, part])
    return out


def ssm_layer_backward_reference(
    dout, x, norm_weight, norm_bias, eps, in_weight, x_weight, out_weight, conv_weight, conv_bias, dt_weight, dt_bias,
    A, D, taps, out_norm_weight, out_norm_bias, out_eps, scale, norm, mean, inverse, uz, steps, y, parameters,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Computes the gradients of `ssm_layer`; without ``parameters`` that of x."""
    d, (E, R) = x.shape[-1], dt_weight.shape
    before, z = uz.chunk(2, -1)
    dbranch = scale_gradient(dout, scale).to(uz.dtype)
    none = x.new_empty(0)

    dy, dz, dout_norm, gated = OPS.gated_norm_backward(
        dbranch @ out_weight, y, z, out_norm_weight, out_norm_bias, out_eps, parameters
    )
    dout_weight = dbranch.reshape(-1, d).T @ gated.view(-1, E) if parameters else none
    del gated, dbranch
    u = OPS.depthwise_conv(before, conv_weight, conv_bias, *CONV_OPTIONS)
    du, ddt, dB, dC, *dcore = OPS.structure_aware_ssm_backward(dy, u, *_split(steps), dt_weight, dt_bias, A, D, taps)
    del dy
    dsteps = torch.cat((ddt, dB, dC), -1).view(-1, R + 2)
    dx_weight = dsteps.T @ u.view(-1, E) if parameters else none
    del u
    du.view(-1, E).addmm_(dsteps, x_weight)
    dbefore, dconv = OPS.depthwise_conv_backward(du, before, conv_weight, conv_bias, *CONV_OPTIONS)
    del du

    dbefore, dz = dbefore.view(-1, E), dz.view(-1, E)
    din_weight = none
    if parameters:
        norm = norm.reshape(-1, d)
        din_weight = torch.empty_like(in_weight)
        torch.mm(dbefore.T, norm, out=din_weight[:E])
        torch.mm(dz.T, norm, out=din_weight[E:])
    dnorm = (dbefore @ in_weight[:E]).addmm_(dz, in_weight[E:])
    dx, dnorm = OPS.layer_norm_backward(dnorm.view(x.shape), x, mean, inverse, norm_weight, norm_bias)
    dx.add_(dout)
    if not parameters:
        return dx, *(x.new_empty(0) for _ in range(14))
    # An op returns no views of one tensor as several.
    dnorm_weight, dnorm_bias, dconv_weight, dconv_bias, dout_norm_weight, dout_norm_bias = (
        gradient.clone() for gradient in (*dnorm, *split_gradient(dconv), *dout_norm)
    )
    return (
        dx, dnorm_weight, dnorm_bias, din_weight, dx_weight, dout_weight, dconv_weight, dconv_bias, *dcore,
        dout_norm_weight, dout_norm_bias,
    )  # fmt: skip


def _split(steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return steps.split((steps.shape[-1] - 2, 1, 1), -1)
