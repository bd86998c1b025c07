"""The depthwise convolution and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

KERNEL = 9
"""Taps of a channel."""

ACTIVATIONS = ('none', 'silu', 'relu')
STRIDES = (1, 2)


def check_options(stride: int, activation: str, residual: bool) -> None:
    """Raises a ValueError unless the options of `depthwise_conv` have values that it knows."""
    op = 'depthwise_conv'
    if stride not in STRIDES:
        raise ValueError(f'{op}: stride must be 1 or 2, got {stride!r}')
    if activation not in ACTIVATIONS:
        raise ValueError(f'{op}: activation must be one of {", ".join(ACTIVATIONS)}, got {activation!r}')
    if residual and stride != 1:
        raise ValueError(f'{op}: residual needs stride 1, got {stride!r}')


def output_shape(x: torch.Tensor, stride: int) -> tuple[int, ...]:
    """Returns the shape of `depthwise_conv`'s output."""
    N, H, W, E = x.shape
    return N, (H + stride - 1) // stride, (W + stride - 1) // stride, E


def depthwise_conv_reference(x, weight, bias, stride, activation, relu_input, residual) -> torch.Tensor:
    """Computes `depthwise_conv` with plain PyTorch; in 16 bits as autocast does, with kernels rounded to them."""
    check_options(stride, activation, residual)
    if relu_input:
        x = F.relu(x)
    y = _convolve(x, weight, bias, stride)
    if activation != 'none':
        y = F.silu(y) if activation == 'silu' else F.relu(y)
    return (x + y if residual else y).contiguous()


def depthwise_conv_backward_reference(
    dy, x, weight, bias, stride, activation, relu_input, residual
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `depthwise_conv` with plain PyTorch, from the inputs alone.

    Returns:
        dx, and the gradients of weight and bias one after the other, (10 E,): one tensor, so that partial sums of both
        are added at once. That of a bias that is not there is computed too.
    """
    check_options(stride, activation, residual)
    if tuple(dy.shape) != output_shape(x, stride):
        raise ValueError(f'depthwise_conv: dy must have shape {output_shape(x, stride)}, got {tuple(dy.shape)}')
    rectified = F.relu(x) if relu_input else x
    dpre = dy
    if activation == 'silu':
        dpre = torch.ops.aten.silu_backward(dy, _convolve(rectified, weight, bias, stride))
    elif activation == 'relu':
        dpre = torch.ops.aten.threshold_backward(dy, _convolve(rectified, weight, bias, stride), 0)
    E = x.shape[-1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dpre.permute(0, 3, 1, 2), rectified.permute(0, 3, 1, 2), weight.to(x.dtype), [E], [stride] * 2, [1, 1], [1, 1],
        False, [0, 0], E, [True, True, True],
    )  # fmt: skip
    dx = dx.permute(0, 2, 3, 1)
    if residual:
        dx = dx + dy
    if relu_input:
        dx = torch.ops.aten.threshold_backward(dx, x, 0)
    return dx.contiguous(), torch.cat((dweight.flatten(), dbias)).to(weight.dtype)


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int) -> torch.Tensor:
    images = x.permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(images, weight.to(x.dtype), bias, stride, padding=1, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)
