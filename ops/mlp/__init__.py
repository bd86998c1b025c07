"""The MLP branch of a Spatial-Mamba block, norm and skip connection included, as one op."""

import torch

from ..checks import check_parameter, check_scale, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, is_compiled, matmul_dtype, refuse_double_backward, register_autograd
from .reference import mlp_backward_reference, mlp_reference


def mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Computes ``x + scale · (GELU(LN(x) weight1ᵀ + bias1) weight2ᵀ + bias2)`` for each token, with the exact GELU.

    Args:
        x: Tokens, (N, ..., d); float32, float64, bfloat16 or float16.
        norm_weight: Scale of the LayerNorm, (d,), dimensionless.
        norm_bias: Shift of the LayerNorm, (d,), dimensionless.
        weight1: First matrix, (F, d).
        bias1: Its bias, (F,).
        weight2: Second matrix, (d, F).
        bias2: Its bias, (d,).
        scale: Factor on the branch of each image, as drop path draws it, (N,), without gradient; None for 1.
        eps: Added to the variance, in units of x².

    Returns:
        out, (N, ..., d), contiguous, of the dtype to which that of ``x`` and that of the products promote.

    Raises:
        TypeError: A tensor is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above, or ``scale`` requires a gradient.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: as in linear layers the products, their biases and the hidden values are in autocast's dtype where it
        is on, else in that of ``x``; norm and GELU are computed in float32 (float64 for float64) and rounded once.
        For backward the C++ kernel keeps x and the hidden values before the activation, (..., F), and computes norm and
        GELU again in the cache; the reference keeps all that PyTorch's layers keep. Where no parameter requires a
        gradient, backward computes that of ``x`` alone. Two runs give the same bits on the CPU; on other devices
        PyTorch's own products decide. No double backward.

        Source: arXiv 2410.15091, MLP of a Spatial-Mamba block.
    """
    op = 'mlp'
    check_tensor(op, 'x', x)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f'{op}: x must have at least two dimensions and one channel, got shape {tuple(x.shape)}')
    d = x.shape[-1]
    check_tensor(op, 'weight1', weight1, 2)
    hidden = len(weight1)
    arguments = {
        'norm_weight': (norm_weight, (d,)), 'norm_bias': (norm_bias, (d,)), 'weight1': (weight1, (hidden, d)),
        'bias1': (bias1, (hidden,)), 'weight2': (weight2, (d, hidden)), 'bias2': (bias2, (d,)),
    }  # fmt: skip
    for name, (argument, shape) in arguments.items():
        check_parameter(op, name, argument, shape, x)
    tensors = (x, *(argument for argument, _ in arguments.values()))
    refuse_forward_mode(op, *tensors)
    dtype = matmul_dtype(x)
    x = x.to(torch.promote_types(x.dtype, dtype))
    acc = accumulation_dtype(x.dtype)
    if scale is not None:
        check_scale(op, scale, x)
        scale = scale.to(x.dtype).repeat_interleave(x.shape[1:-1].numel())
    out, *_ = torch.ops.mmspatialmamba.mlp(
        x.reshape(-1, d), norm_weight.to(acc), norm_bias.to(acc), eps, weight1.to(dtype), bias1.to(dtype),
        weight2.to(dtype), bias2.to(dtype), scale,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )  # fmt: skip
    return out.view(x.shape)


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, ctx.eps, weight1, _, weight2, _, scale, _ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight1, weight2, scale, *output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    x, norm_weight, norm_bias, weight1, weight2, scale, *kept = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:])
    dx, *gradients = torch.ops.mmspatialmamba.mlp_backward(
        dout, x, norm_weight, norm_bias, ctx.eps, weight1, weight2, scale, kept, parameters
    )
    dnorm_weight, dnorm_bias, *gradients = gradients if parameters else [None] * len(gradients)
    return dx, dnorm_weight, dnorm_bias, None, *gradients, None, None


def _fake(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, keep):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not keep:
        return out, []
    hidden = weight1.new_empty(len(x), len(weight1))
    if is_compiled('mlp', x.device):
        return out, [hidden]
    return out, [torch.empty_like(out, dtype=weight1.dtype), *_statistics(x), hidden, torch.empty_like(hidden)]


def _statistics(x: torch.Tensor) -> list[torch.Tensor]:
    """Returns mean and inverse deviation of a `layer_norm`, without values."""
    return [x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype)) for _ in range(2)]


def _fake_backward(dout, x, norm_weight, norm_bias, eps, weight1, weight2, scale, kept, parameters):
    shapes = [norm_weight.shape, norm_bias.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]]
    likes = (norm_weight, norm_bias, *[weight1] * 4)
    gradients = [like.new_empty(shape if parameters else 0) for like, shape in zip(likes, shapes)]
    return x.new_empty(x.shape), *gradients


_SHAPES = 'x: L d, norm_weight: d, norm_bias: d, weight1: F d, weight2: d F, scale?: L'

define(
    'mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1, Tensor bias1, Tensor weight2,'
    ' Tensor bias2, Tensor? scale, bool keep) -> (Tensor out, Tensor[] kept)',
    f'{_SHAPES}, bias1: F, bias2: d',
    mlp_reference,
    _fake,
)
define(
    'mlp_backward(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1,'
    ' Tensor weight2, Tensor? scale, Tensor[] kept, bool parameters) -> (Tensor dx,'
    ' Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2)',
    f'dout: L d, {_SHAPES}',
    mlp_backward_reference,
    _fake_backward,
)
register_autograd('mlp', _backward, _setup_context)
refuse_double_backward('mlp_backward')
