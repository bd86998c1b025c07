"""The 3x3 depthwise convolutions of Spatial-Mamba, each with what stands around it in the model, as one op."""

import torch

from ..checks import check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from .reference import (
    KERNEL,
    check_options,
    depthwise_conv_backward_reference,
    depthwise_conv_reference,
    output_shape,
)


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int = 1,
    activation: str = 'none',
    relu_input: bool = False,
    residual: bool = False,
) -> torch.Tensor:
    """Convolves each channel of a map with a 3x3 kernel of its own; one row and column of zeros is padded on each side.

    ``y = activation(conv(x) + bias)``, plus x with ``residual``; x is replaced by ``ReLU(x)`` with ``relu_input``.

    Args:
        x: Map, (N, H, W, E), channels last; float32, float64, bfloat16 or float16. A slice of the channels of a wider
            map is read where it lies.
        weight: Kernels, (E, 1, 3, 3), dimensionless.
        bias: Bias, (E,), in units of the convolution; None for 0.
        stride: 1 or 2, for rows and columns alike.
        activation: 'none', 'silu' or 'relu', applied to the convolution.
        relu_input: Whether ReLU is applied to x first.
        residual: Whether x is added to the result; for stride 1.

    Returns:
        y, (N, ceil(H / stride), ceil(W / stride), E), contiguous, dtype of ``x``.

    Raises:
        TypeError: A tensor is no floating-point tensor.
        ValueError: An argument has another shape, device or value than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``x``; weight and bias are converted to float32
        (float64 for float64), in which the C++ and the Triton kernel compute. Backward keeps the inputs only, and
        computes the convolution again where there is an activation. Two runs give the same bits with both kernels,
        forward and backward; elsewhere PyTorch's own convolution decides. No double backward.
    """
    op = 'depthwise_conv'
    check_tensor(op, 'x', x, 4)
    check_not_empty(op, 'x', x)
    check_parameter(op, 'weight', weight, (x.shape[-1], 1, 3, 3), x)
    if bias is not None:
        check_parameter(op, 'bias', bias, (x.shape[-1],), x)
    check_options(stride, activation, residual)
    refuse_forward_mode(op, x, weight, *([] if bias is None else [bias]))
    acc = accumulation_dtype(x.dtype)
    bias = None if bias is None else bias.to(acc)
    return torch.ops.mmspatialmamba.depthwise_conv(x, weight.to(acc), bias, stride, activation, relu_input, residual)


def split_gradient(dparameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of weight (E, 1, 3, 3) and bias (E,), views of what the backward op returns for both."""
    E = len(dparameters) // (KERNEL + 1)
    return dparameters[: KERNEL * E].view(E, 1, 3, 3), dparameters[KERNEL * E :]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dparameters = torch.ops.mmspatialmamba.depthwise_conv_backward(dy, x, weight, bias, *ctx.options)
    dweight, dbias = split_gradient(dparameters)
    return dx, dweight, None if bias is None else dbias, *[None] * len(ctx.options)


def _fake(x, weight, bias, stride, *options):
    return x.new_empty(output_shape(x, stride))


_SHAPES = 'x: N H W E, weight: E 1 3 3, bias?: E'

define(
    'depthwise_conv(Tensor x, Tensor weight, Tensor? bias, int stride, str activation, bool relu_input, bool residual)'
    ' -> Tensor',
    _SHAPES,
    depthwise_conv_reference,
    _fake,
)
define(
    'depthwise_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int stride, str activation,'
    ' bool relu_input, bool residual) -> (Tensor dx, Tensor dparameters)',
    f'dy: N H_out W_out E, {_SHAPES}',
    depthwise_conv_backward_reference,
    lambda dy, x, weight, *others: (x.new_empty(x.shape), weight.new_empty((KERNEL + 1) * len(weight))),
)
register_autograd('depthwise_conv', _backward, _setup_context)
refuse_double_backward('depthwise_conv_backward')
