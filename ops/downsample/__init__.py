"""The wide convolutions of a downsample of Spatial-Mamba as one op made of the others."""

import torch

from ..checks import check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..depthwise_conv.reference import output_shape
from ..library import accumulation_dtype, define, matmul_dtype, refuse_double_backward, register_autograd
from .reference import STRIDE, downsample_backward_reference, downsample_reference, keeps_hidden

OPS = torch.ops.mmspatialmamba


def downsample(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor
) -> torch.Tensor:
    """Computes ``ReLU(conv(ReLU(x weightᵀ + bias)) + conv_bias)`` with a 3x3 depthwise convolution of stride 2.

    Args:
        x: Map, (N, H, W, d), channels last; float32, float64, bfloat16 or float16.
        weight: Matrix to the hidden channels, (F, d).
        bias: Its bias, (F,).
        conv_weight: Kernels of the depthwise convolution, (F, 1, 3, 3), see `depthwise_conv`.
        conv_bias: Its bias, (F,).

    Returns:
        out, (N, ceil(H / 2), ceil(W / 2), F), contiguous, in autocast's dtype where it is on and x not float64, else in
        that of ``x``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: as a 1x1 convolution, which it is, and the depthwise one in the dtype of what that returns. On a CPU
        the hidden map, (N, H, W, F), the largest of the network, never is in memory as a whole: it is computed some
        channels at a time, again in backward, which keeps x alone. On other devices it is kept, as the layers keep it.
        Where no parameter requires a gradient, backward computes that of ``x`` alone. Two runs give the same bits on
        the CPU; on other devices PyTorch's own convolutions decide. No double backward.

        Source: arXiv 2410.15091, downsample.
    """
    op = 'downsample'
    check_tensor(op, 'x', x, 4)
    check_not_empty(op, 'x', x)
    check_tensor(op, 'weight', weight, 2)
    hidden = len(weight)
    arguments = {
        'weight': (weight, (hidden, x.shape[-1])), 'bias': (bias, (hidden,)),
        'conv_weight': (conv_weight, (hidden, 1, 3, 3)), 'conv_bias': (conv_bias, (hidden,)),
    }  # fmt: skip
    for name, (argument, shape) in arguments.items():
        check_parameter(op, name, argument, shape, x)
    tensors = (x, weight, bias, conv_weight, conv_bias)
    refuse_forward_mode(op, *tensors)
    dtype = matmul_dtype(x)
    acc = accumulation_dtype(dtype)
    out, _ = OPS.downsample(
        x.to(dtype), weight.to(dtype), bias.to(dtype), conv_weight.to(acc), conv_bias.to(acc),
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )  # fmt: skip
    return out


def _setup_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 6
    x, weight, bias, conv_weight, conv_bias, *kept = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:])
    dx, *gradients = OPS.downsample_backward(dout, x, weight, bias, conv_weight, conv_bias, kept, parameters)
    return dx, *(gradients if parameters else [None] * len(gradients)), None


def _fake(x, weight, bias, conv_weight, conv_bias, keep):
    out = x.new_empty((*output_shape(x, STRIDE)[:-1], len(weight)))
    return out, [x.new_empty((*x.shape[:-1], len(weight)))] if keep and keeps_hidden(x) else []


def _fake_backward(dout, x, weight, bias, conv_weight, conv_bias, kept, parameters):
    tensors = (weight, bias, conv_weight, conv_bias)
    return x.new_empty(x.shape), *(tensor.new_empty(tensor.shape if parameters else 0) for tensor in tensors)


_PARAMETERS = 'Tensor x, Tensor weight, Tensor bias, Tensor conv_weight, Tensor conv_bias'
_SHAPES = 'x: N H W d, weight: F d, bias: F, conv_weight: F 1 3 3, conv_bias: F'
define(
    f'downsample({_PARAMETERS}, bool keep) -> (Tensor out, Tensor[] kept)',
    _SHAPES,
    downsample_reference,
    _fake,
)
define(
    f'downsample_backward(Tensor dout, {_PARAMETERS}, Tensor[] kept, bool parameters)'
    ' -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dconv_weight, Tensor dconv_bias)',
    f'dout: N H/2 W/2 F, {_SHAPES}',
    downsample_backward_reference,
    _fake_backward,
)
register_autograd('downsample', _backward, _setup_context)
refuse_double_backward('downsample_backward')
