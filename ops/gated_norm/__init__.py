"""LayerNorm times SiLU of a gate, which follows the state space model in a Spatial-Mamba block, as one op."""

import torch

from ..checks import check_like, check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from .reference import gated_norm_backward_reference, gated_norm_reference


def gated_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Normalizes the channels of each token and scales them by a gate: ``out = LN(y) · SiLU(z)``.

    ``LN(y) = (y - mean) / sqrt(variance + eps) · weight + bias``, with mean and variance over the E channels.

    Args:
        y: Map, (N, H, W, E), channels last; float32, float64, bfloat16 or float16.
        z: Gate before SiLU, (N, H, W, E), dtype of ``y``. A slice of the channels of a wider map is read where it lies.
        weight: Scale of each channel, (E,), dimensionless.
        bias: Shift of each channel, (E,), dimensionless.
        eps: Added to the variance, in units of y².

    Returns:
        out, (N, H, W, E), contiguous, dtype of ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor, or z has another dtype than ``y``.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``y``; everything is computed in float32
        (float64 for float64) and rounded once, and weight and bias are converted to that dtype. Backward keeps the
        inputs only. Two runs give the same bits with the C++ and the Triton kernel, forward and backward; elsewhere
        PyTorch's own LayerNorm decides. No double backward.

        Source: arXiv 2410.15091, output of the structure-aware state space model.
    """
    op = 'gated_norm'
    check_tensor(op, 'y', y, 4)
    check_not_empty(op, 'y', y)
    check_like(op, 'z', z, tuple(y.shape), y)
    check_parameter(op, 'weight', weight, (y.shape[-1],), y)
    check_parameter(op, 'bias', bias, (y.shape[-1],), y)
    refuse_forward_mode(op, y, z, weight, bias)
    acc = accumulation_dtype(y.dtype)
    return torch.ops.mmspatialmamba.gated_norm(y, z, weight.to(acc), bias.to(acc), eps)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    dy, dz, dparameters, _ = torch.ops.mmspatialmamba.gated_norm_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dy, dz, *dparameters.unbind(), None


def _fake_backward(dout, y, z, weight, bias, eps, with_out=False):
    out = y.new_empty(y.shape if with_out else 0)
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(2, len(weight)), out


_SHAPES = 'y: N H W E, z: N H W E, weight: E, bias: E'

define(
    'gated_norm(Tensor y, Tensor z, Tensor weight, Tensor bias, float eps) -> Tensor',
    _SHAPES,
    gated_norm_reference,
    lambda y, *others: y.new_empty(y.shape),
)
define(
    'gated_norm_backward(Tensor dout, Tensor y, Tensor z, Tensor weight, Tensor bias, float eps, bool with_out=False)'
    ' -> (Tensor dy, Tensor dz, Tensor dparameters, Tensor out)',
    f'dout: N H W E, {_SHAPES}',
    gated_norm_backward_reference,
    _fake_backward,
)
register_autograd('gated_norm', _backward, _setup_context)
refuse_double_backward('gated_norm_backward')
