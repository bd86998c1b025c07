"""Layers of Spatial-Mamba around its state space model; maps are channels-last, (N, H, W, C), unless stated."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import depthwise_conv, mlp
from ..ops.compat import is_compiling
from ..ops.residual import add_branch


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution of a channels-last map, computed by `mmspatialmamba.ops.depthwise_conv`.

    Args:
        channels: Number of channels.
        stride: 1 or 2.
        activation: What follows the convolution: 'none', 'silu' or 'relu'.
        relu_input: Whether ReLU comes before it.
        residual: Whether the input is added to the result.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        activation: str = 'none',
        relu_input: bool = False,
        residual: bool = False,
    ):
        super().__init__(channels, channels, 3, stride, padding=1, groups=channels)
        self.options = {
            'stride': stride, 'activation': activation, 'relu_input': relu_input, 'residual': residual,
        }  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, channels) to (N, ceil(H / stride), ceil(W / stride), channels)."""
        return depthwise_conv(x, self.weight, self.bias, **self.options)


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm, on (N, C, H, W).

    Where BatchNorm uses its running statistics, which makes it a scale and a shift of each channel, the convolution
    takes both into its own weight and bias, computed anew in each call: a pass over the map less.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Side of the kernel; padded so that stride 1 keeps the size.
        stride: Stride.
        bias: Whether the convolution has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        norm, conv = self.norm, self.conv
        # Tools that merge the two for good leave an Identity; those that count and export trace, and look for layers.
        if norm.training or torch.jit.is_tracing() or not is_plain(conv, norm):
            return norm(self._convolve(x))
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, norm.bias - shift * scale, conv.stride, conv.padding)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the convolution alone: if it is 1x1 as a product, whose backward uses a CPU's cores better."""
        conv = self.conv
        if x.device.type == 'cpu' and is_fusable(conv) and conv.kernel_size == (1, 1):
            return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
        return conv(x)


class Stem(nn.Module):
    """Embeds an image at stride 4 by overlapping convolutions with one residual branch.

    Args:
        in_channels: Number of image channels.
        channels: Number of output channels C; even.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.reduce = ConvNorm(in_channels, half, 3, stride=2)
        self.residual = nn.Sequential(ConvNorm(half, half, 3), nn.ReLU(inplace=True), ConvNorm(half, half, 3))
        self.expand = ConvNorm(half, 4 * channels, 3, stride=2)
        self.project = ConvNorm(4 * channels, channels, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps an image (N, in_channels, H, W) to (N, ceil(H/4), ceil(W/4), C)."""
        x = self.act(self.reduce(x.contiguous(memory_format=torch.channels_last)))
        x = x + self.residual(x)
        return self.project(self.act(self.expand(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Halves the grid and doubles the channels through a wide depthwise convolution.

    Args:
        channels: Number of input channels d.
    """

    PARTS = 4
    """In which a CPU takes the hidden channels, whose map is the largest of all: a quarter of it is still in the cache
    when the depthwise convolution reads it."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 8 * channels
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.dwconv = DepthwiseConv(hidden, stride=2, activation='relu', relu_input=True)
        self.project = ConvNorm(hidden, 2 * channels, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, ceil(H/2), ceil(W/2), 2d)."""
        if x.device.type == 'cpu' and is_fusable(self.expand, self.dwconv):
            parameters = (self.expand.weight.flatten(1), self.expand.bias, self.dwconv.weight, self.dwconv.bias)
            parts = zip(*(parameter.chunk(self.PARTS) for parameter in parameters))
            x = torch.cat(
                [
                    depthwise_conv(F.linear(x, weight, bias), *kernels, **self.dwconv.options)
                    for weight, bias, *kernels in parts
                ],
                dim=-1,
            )
        else:
            x = self.dwconv(self.expand(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.project(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MLP(nn.Module):
    """MLP branch of a block: two linear layers with an exact GELU between, of ratio 4, and the skip connection.

    Args:
        channels: Number of channels d of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x + scale · MLP(norm(x))``, (N, H, W, d), as one op where it can be, see `is_fusable`.

        Args:
            x: Map, (N, H, W, d).
            norm: What comes before the first linear layer.
            scale: Factor on the branch of each image, (N,); None for 1.
        """
        fc1, fc2 = self.fc1, self.fc2
        if is_fusable(norm, fc1, self.act, fc2):
            return mlp(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, scale, eps=norm.eps)
        return add_branch(x, fc2(self.act(fc1(norm(x)))), scale)


def is_plain(*layers: nn.Module) -> bool:
    """Returns whether each layer is of its own class, or any BatchNorm, and nothing hooks into it.

    What reads a layer's weights and leaves its ``forward`` out would pass over what replaced it: an adapter, a
    quantized or a sharded layer. BatchNorm has subclasses that differ in the shapes they accept.
    """
    plain = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, DepthwiseConv)
    hooks = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
    return not module._has_any_global_hook() and all(
        (type(layer) in plain or isinstance(layer, _BatchNorm)) and not any(getattr(layer, name) for name in hooks)
        for layer in layers
    )


def is_fusable(*layers: nn.Module) -> bool:
    """Returns whether one op may take the place of these layers: whether nothing would notice.

    What compiles, exports or traces a model looks for standard layers.
    """
    return not is_compiling() and not torch.jit.is_tracing() and is_plain(*layers)
