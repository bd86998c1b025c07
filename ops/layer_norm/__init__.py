"""LayerNorm before the products of a block as one op, which hands them what they read: maps in their own dtype."""

import torch

from ..checks import check_parameter, check_tensor, refuse_forward_mode
from ..library import (
    LIBRARY,
    REFERENCES,
    accumulation_dtype,
    define,
    matmul_dtype,
    refuse_double_backward,
    register_autograd,
)
from .reference import layer_norm_backward_reference, layer_norm_reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalizes the channels of each token: ``out = (x - mean) / sqrt(variance + eps) · weight + bias``.

    Mean and variance are over the E channels.

    Args:
        x: Map or tokens, (N, ..., E); float32, float64, bfloat16 or float16.
        weight: Scale of each channel, (E,), dimensionless; None for 1.
        bias: Shift of each channel, (E,), dimensionless; None for 0.
        eps: Added to the variance, in units of x².

    Returns:
        out, (N, ..., E), contiguous, in autocast's dtype where it is on and x not float64, else in that of ``x``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: PyTorch's LayerNorm returns float32 on a GPU, which the product after it rounds: 20 bytes per value
        where this op moves 4. Everything is computed in float32 (float64 for float64) and rounded once; weight and
        bias are converted to that dtype. Backward keeps x and, for each token, mean and inverse deviation. Two runs
        give the same bits with the Triton kernel, forward and backward; elsewhere PyTorch's own LayerNorm decides. No
        double backward.
    """
    op = 'layer_norm'
    check_tensor(op, 'x', x)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f'{op}: x must have at least two dimensions and one channel, got shape {tuple(x.shape)}')
    acc = accumulation_dtype(x.dtype)
    parameters = []
    for name, parameter in (('weight', weight), ('bias', bias)):
        if parameter is not None:
            check_parameter(op, name, parameter, (x.shape[-1],), x)
            parameter = parameter.to(acc)
        parameters.append(parameter)
    refuse_forward_mode(op, *(tensor for tensor in (x, weight, bias) if tensor is not None))
    out, _, _ = torch.ops.mmspatialmamba.layer_norm(x, *parameters, eps, matmul_dtype(x))
    return out


def _setup_context(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x, mean, inverse, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 5
    x, mean, inverse, weight, bias = ctx.saved_tensors
    dx, dparameters = torch.ops.mmspatialmamba.layer_norm_backward(dout, x, mean, inverse, weight, bias)
    dweight, dbias = dparameters.unbind()
    return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


def _fake(x, weight, bias, eps, dtype):
    statistics = x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), statistics, torch.empty_like(statistics)


define(
    'layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)'
    ' -> (Tensor out, Tensor mean, Tensor inverse)',
    'x: ... E, weight?: E, bias?: E',
    layer_norm_reference,
    _fake,
)
define(
    'layer_norm_backward(Tensor dout, Tensor x, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias)'
    ' -> (Tensor dx, Tensor dparameters)',
    'dout: ... E, x: ... E, mean: ... 1, inverse: ... 1, weight?: E, bias?: E',
    layer_norm_backward_reference,
    lambda dout, x, mean, *parameters: (x.new_empty(x.shape), mean.new_empty(2, x.shape[-1])),
)
register_autograd('layer_norm', _backward, _setup_context)
refuse_double_backward('layer_norm_backward')
# On a CPU PyTorch's own LayerNorm is one pass each way already: its own autograd spares a call of Python, and
# torch.compile and torch.export see a standard layer.
LIBRARY.impl('layer_norm', REFERENCES['layer_norm'], 'AutogradCPU')
