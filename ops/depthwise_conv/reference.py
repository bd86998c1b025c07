"""The depthwise convolution and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

KERNEL = 9
"""Taps of a channel."""


def depthwise_conv_reference(x, weight, bias, stride, activation, relu_input, residual) -> torch.Tensor:
    """Computes `depthwise_conv` with plain PyTorch; in 16 bits as autocast does, with kernels rounded to them."""
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
