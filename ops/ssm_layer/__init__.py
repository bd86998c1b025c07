"""The state space branch of a Spatial-Mamba block, norm and skip connection included, as one op made of the others."""

import torch

from ..checks import check_not_empty, check_parameter, check_scale, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, matmul_dtype, refuse_double_backward, register_autograd
from ..state_fusion.taps import TAP_OFFSETS
from .reference import ssm_layer_backward_reference, ssm_layer_reference

OPS = torch.ops.mmspatialmamba


def ssm_layer(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_weight: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    taps: torch.Tensor,
    out_norm_weight: torch.Tensor,
    out_norm_bias: torch.Tensor,
    out_weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    out_eps: float = 1e-5,
) -> torch.Tensor:
    """Computes the state space branch of a block, from its norm to its skip connection.

    1. ``u, z = split(LN(x) in_weightᵀ)``, each (N, H, W, E).
    2. ``u = SiLU(conv(u) + conv_bias)``, see `depthwise_conv`.
    3. ``dt, B, C = split(u x_weightᵀ)``, of R, 1 and 1 channels.
    4. ``y = structure_aware_ssm(u, dt, B, C, dt_weight, dt_bias, A, D, taps)``, see `structure_aware_ssm`.
    5. ``out = x + scale · gated_norm(y, z) out_weightᵀ``, see `gated_norm`.

    Args:
        x: Map, (N, H, W, d), channels last; float32, float64, bfloat16 or float16.
        norm_weight: Scale of the first LayerNorm, (d,), dimensionless.
        norm_bias: Shift of the first LayerNorm, (d,), dimensionless.
        in_weight: Projection to u and z, (2E, d).
        conv_weight: Kernels of the depthwise convolution, (E, 1, 3, 3).
        conv_bias: Its bias, (E,).
        x_weight: Projection to step size, B and C, (R + 2, E).
        dt_weight: Projection of the step size, (E, R).
        dt_bias: Bias of the step size before softplus, (E,).
        A: Decay rate, (E,), negative.
        D: Skip weight, (E,).
        taps: Weights of the fusion, (25, E), from `fusion_taps`.
        out_norm_weight: Scale of the gated LayerNorm, (E,), dimensionless.
        out_norm_bias: Shift of the gated LayerNorm, (E,), dimensionless.
        out_weight: Last projection, (d, E).
        scale: Factor on the branch of each image, as drop path draws it, (N,), without gradient; None for 1.
        eps: Added to the variance of the first norm, in units of x².
        out_eps: Added to the variance of the gated norm, in units of y².

    Returns:
        out, (N, H, W, d), contiguous, of the dtype to which that of ``x`` and that of the products promote.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above, or ``scale`` requires a gradient.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: as in linear layers the three products run in autocast's dtype where it is on, else in that of ``x``,
        and so do the maps between them; inside, each op computes as its own note says, and the first norm is PyTorch's,
        whose CPU kernel sums the gradient of its weight in the dtype of ``x``. Backward keeps x and its norm, u and z
        before the convolution, and y; u after the convolution and the gated norm are computed again, which layer by
        layer would be kept. Where no parameter requires a gradient, backward computes that of ``x`` alone. Two runs
        give the same bits on the CPU; on other devices PyTorch's own products and norms decide. No double backward.

        Source: arXiv 2410.15091, structure-aware state space model.
    """
    op = 'ssm_layer'
    check_tensor(op, 'x', x, 4)
    check_not_empty(op, 'x', x)
    check_tensor(op, 'dt_weight', dt_weight, 2)
    d = x.shape[-1]
    E, R = dt_weight.shape
    arguments = {
        'norm_weight': (norm_weight, (d,)), 'norm_bias': (norm_bias, (d,)), 'in_weight': (in_weight, (2 * E, d)),
        'conv_weight': (conv_weight, (E, 1, 3, 3)), 'conv_bias': (conv_bias, (E,)),
        'x_weight': (x_weight, (R + 2, E)), 'dt_weight': (dt_weight, (E, R)), 'dt_bias': (dt_bias, (E,)),
        'A': (A, (E,)), 'D': (D, (E,)), 'taps': (taps, (len(TAP_OFFSETS), E)),
        'out_norm_weight': (out_norm_weight, (E,)), 'out_norm_bias': (out_norm_bias, (E,)),
        'out_weight': (out_weight, (d, E)),
    }  # fmt: skip
    for name, (argument, shape) in arguments.items():
        check_parameter(op, name, argument, shape, x)
    tensors = (x, *(argument for argument, _ in arguments.values()))
    refuse_forward_mode(op, *tensors)
    dtype = matmul_dtype(x)
    x = x.to(torch.promote_types(x.dtype, dtype))
    x_acc, acc = accumulation_dtype(x.dtype), accumulation_dtype(dtype)
    if scale is not None:
        check_scale(op, scale, x)
        scale = scale.to(x.dtype)
    inner = (conv_weight, conv_bias, dt_weight, dt_bias, A, D, taps, out_norm_weight, out_norm_bias)
    out, *_ = OPS.ssm_layer(
        x, norm_weight.to(x_acc), norm_bias.to(x_acc), eps,
        in_weight.to(dtype), x_weight.to(dtype), out_weight.to(dtype), *(tensor.to(acc) for tensor in inner), out_eps,
        scale, torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )  # fmt: skip
    return out


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, ctx.eps, *parameters, ctx.out_eps, scale, _ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, *parameters, scale, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 19
    *inputs, scale, norm, mean, inverse, uz, steps, y = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:])
    dx, *gradients = OPS.ssm_layer_backward(
        dout, *inputs[:3], ctx.eps, *inputs[3:], ctx.out_eps, scale, norm, mean, inverse, uz, steps, y, parameters
    )
    dnorm_weight, dnorm_bias, *gradients = gradients if parameters else [None] * len(gradients)
    return dx, dnorm_weight, dnorm_bias, None, *gradients, None, None, None


def _fake(x, norm_weight, norm_bias, eps, in_weight, x_weight, out_weight, conv_weight, *others):
    *_, keep = others
    widths = (x.shape[-1], 1, 1, len(in_weight), len(x_weight), len(conv_weight))
    likes = (in_weight, norm_weight, norm_weight, *[in_weight] * 3)  # mean and deviation are as exact as the parameters
    shapes = [(*x.shape[:-1], width) if keep else (0,) for width in widths]
    return x.new_empty(x.shape), *(like.new_empty(shape) for like, shape in zip(likes, shapes))


def _fake_backward(dout, x, norm_weight, norm_bias, eps, *others):
    *_, parameters = others
    tensors = (norm_weight, norm_bias, *others[:12])
    gradients = [tensor.new_empty(tensor.shape) if parameters else x.new_empty(0) for tensor in tensors]
    return x.new_empty(x.shape), *gradients


_PARAMETERS = (
    'Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor in_weight, Tensor x_weight, Tensor out_weight,'
    ' Tensor conv_weight, Tensor conv_bias, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor taps,'
    ' Tensor out_norm_weight, Tensor out_norm_bias, float out_eps, Tensor? scale'
)
_SHAPES = (
    'x: N H W d, norm_weight: d, norm_bias: d, in_weight: 2E d, x_weight: R+2 E, out_weight: d E, conv_weight: E 1 3 3,'
    ' conv_bias: E, dt_weight: E R, dt_bias: E, A: E, D: E, taps: 25 E, out_norm_weight: E, out_norm_bias: E, scale?: N'
)
define(
    f'ssm_layer({_PARAMETERS}, bool keep)'
    ' -> (Tensor out, Tensor norm, Tensor mean, Tensor inverse, Tensor uz, Tensor steps, Tensor y)',
    _SHAPES,
    ssm_layer_reference,
    _fake,
)
define(
    f'ssm_layer_backward(Tensor dout, {_PARAMETERS}, Tensor norm, Tensor mean, Tensor inverse, Tensor uz, Tensor steps,'
    ' Tensor y, bool parameters) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor din_weight,'
    ' Tensor dx_weight, Tensor dout_weight, Tensor dconv_weight, Tensor dconv_bias, Tensor ddt_weight,'
    ' Tensor ddt_bias, Tensor dA, Tensor dD, Tensor dtaps, Tensor dout_norm_weight, Tensor dout_norm_bias)',
    f'dout: N H W d, {_SHAPES}, norm: N H W d, mean: N H W 1, inverse: N H W 1, uz: N H W 2E, steps: N H W R+2,'
    ' y: N H W E',
    ssm_layer_backward_reference,
    _fake_backward,
)
register_autograd('ssm_layer', _backward, _setup_context)
refuse_double_backward('ssm_layer_backward')
