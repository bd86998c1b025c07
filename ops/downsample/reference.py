"""The wide convolutions of a downsample and their gradients from `depthwise_conv` and PyTorch's 1x1 convolution."""

import torch
import torch.nn.functional as F

from ..depthwise_conv import split_gradient
from ..depthwise_conv.reference import output_shape
from ..library import accumulation_dtype

OPS = torch.ops.mmspatialmamba
STRIDE = 2
CONV_OPTIONS = (STRIDE, 'relu', True, False)

VALUES_AT_ONCE = 2**20
"""Hidden values of a part, on a CPU: few enough to stay in the cache."""
FEWEST_CHANNELS = 64
"""Hidden channels of a part of a large map, below which the 1x1 convolution becomes slow."""


def keeps_hidden(x: torch.Tensor) -> bool:
    """Returns whether backward finds the hidden map, which on a CPU is computed again in the cache."""
    return x.device.type != 'cpu'


def downsample_reference(x, weight, bias, conv_weight, conv_bias, keep) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes `downsample`; returns besides the hidden map, if it is to be kept and not to be computed again."""
    if keeps_hidden(x):
        hidden = _expand(x, weight, bias)
        out = OPS.depthwise_conv(hidden, conv_weight, conv_bias, *CONV_OPTIONS)
        return out, [hidden] if keep else []
    out = x.new_empty((*output_shape(x, STRIDE)[:-1], len(weight)))
    for part in _parts(x, len(weight)):
        hidden = _expand(x, weight[part], bias[part])
        out[..., part] = OPS.depthwise_conv(hidden, conv_weight[part], conv_bias[part], *CONV_OPTIONS)
    return out, []


def downsample_backward_reference(
    dout, x, weight, bias, conv_weight, conv_bias, kept, parameters
) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `downsample`; without ``parameters`` that of x."""
    parts = [slice(None)] if kept else _parts(x, len(weight))
    # In 16 bits a sum of many parts would be rounded as often.
    dx = torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) if len(parts) > 1 else None
    gradients = [torch.empty_like(tensor) for tensor in (weight, bias, conv_weight, conv_bias)]
    for part in parts:
        hidden = kept[0] if kept else _expand(x, weight[part], bias[part])
        dhidden, dconv = OPS.depthwise_conv_backward(
            dout[..., part], hidden, conv_weight[part], conv_bias[part], *CONV_OPTIONS
        )
        del hidden
        dpart, dweight, dbias = torch.ops.aten.convolution_backward(
            _images(dhidden), _images(x), weight[part][:, :, None, None], [dhidden.shape[-1]], [1, 1], [0, 0], [1, 1],
            False, [0, 0], 1, [True, parameters, parameters],
        )  # fmt: skip
        dpart = dpart.permute(0, 2, 3, 1)
        dx = dpart if dx is None else dx.add_(dpart)
        if parameters:
            for gradient, value in zip(gradients, (dweight.flatten(1), dbias, *split_gradient(dconv))):
                gradient[part] = value
    return dx.to(x.dtype).contiguous(), *(gradients if parameters else [x.new_empty(0) for _ in gradients])


def _expand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(_images(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def _images(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _parts(x: torch.Tensor, channels: int) -> list[slice]:
    """Returns the parts of the hidden channels that are computed one after the other."""
    width = max(FEWEST_CHANNELS, VALUES_AT_ONCE // max(1, x.shape[:-1].numel()))
    return [slice(first, min(first + width, channels)) for first in range(0, max(1, channels), width)]
