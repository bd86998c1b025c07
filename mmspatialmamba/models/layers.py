"""Layers around the state space models, and initial values; maps are channels-last, (N, H, W, C), unless stated."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops import depthwise_conv, gelu, layer_norm


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution of a channels-last map, computed by `mmspatialmamba.ops.depthwise_conv`.

    Attributes that the op has no argument for, such as another ``padding_mode`` or ``dilation``, are honoured by
    PyTorch's convolution.

    Args:
        channels: Number of channels.
        stride: 1 or 2.
        activation: What follows the convolution: 'none', 'silu' or 'relu'.
        relu_input: Whether ReLU comes before it.
        residual: Whether the input is added to the result.
        bias: Whether there is a bias.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        activation: str = 'none',
        relu_input: bool = False,
        residual: bool = False,
        bias: bool = True,
    ):
        super().__init__(channels, channels, 3, stride, padding=1, groups=channels, bias=bias)
        self.activation = activation
        self.relu_input = relu_input
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, channels) to (N, ceil(H / stride), ceil(W / stride), channels)."""
        geometry = self.kernel_size, self.padding, self.dilation, self.padding_mode, self.groups
        standard = geometry == ((3, 3), (1, 1), (1, 1), 'zeros', self.in_channels) and self.stride in ((1, 1), (2, 2))
        if standard:
            return depthwise_conv(
                x, self.weight, self.bias,
                stride=self.stride[0], activation=self.activation, relu_input=self.relu_input, residual=self.residual,
            )  # fmt: skip
        if self.relu_input:
            x = F.relu(x)
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.activation != 'none':
            y = F.silu(y) if self.activation == 'silu' else F.relu(y)
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        """Returns what the convolution prints, and what stands around it."""
        around = ''.join(f', {name}={getattr(self, name)}' for name in ('activation', 'relu_input', 'residual'))
        return super().extra_repr() + around


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, computed by `mmspatialmamba.ops.layer_norm`, in the dtype of the product after it.

    Args:
        channels: Number of channels.
        eps: Added to the variance.
        elementwise_affine: Whether there is a scale of each channel and, with ``bias``, a shift.
        bias: Whether there is a shift of each channel.
    """

    def __init__(self, channels: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(channels, eps, elementwise_affine, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, ..., channels) to the same shape, under autocast in its dtype."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training a branch is dropped for whole images, and otherwise scaled so that its mean stays.

    Args:
        drop_prob: Probability that an image is dropped, below 1.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Maps (N, ...) to the same shape: one pass over the branch, with a factor of each image."""
        if not (self.training and self.drop_prob):
            return branch
        kept = 1 - self.drop_prob
        return branch * branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        """Returns the probability."""
        return f'drop_prob={self.drop_prob}'


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm, on (N, C, H, W).

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
        return self.norm(self.conv(x))


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
        self.residual = nn.Sequential(ConvNorm(half, half, 3), nn.ReLU(), ConvNorm(half, half, 3))
        self.expand = ConvNorm(half, 4 * channels, 3, stride=2)
        self.project = ConvNorm(4 * channels, channels, 1)
        self.act = nn.ReLU()

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

    def __init__(self, channels: int):
        super().__init__()
        hidden = 8 * channels
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.dwconv = DepthwiseConv(hidden, stride=2, activation='relu', relu_input=True)
        self.project = ConvNorm(hidden, 2 * channels, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, ceil(H/2), ceil(W/2), 2d)."""
        x = self.dwconv(self.expand(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.project(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GELU(nn.GELU):
    """GELU, computed by `mmspatialmamba.ops.gelu`; by PyTorch where it is to be approximated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a tensor of any shape to the same shape."""
        return gelu(x) if self.approximate == 'none' else super().forward(x)


class MLP(nn.Module):
    """MLP branch of a block: two linear layers with an exact GELU between, of ratio 4.

    Args:
        channels: Number of channels d of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        return self.fc2(self.act(self.fc1(x)))


STEP_RANGE = (1e-3, 1e-1)
"""Range of the initial step size Δ at dt = 0, which is drawn log-uniformly."""


@torch.no_grad()
def draw_step_size(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Draws the projection of a step size uniformly, and its bias so that Δ is log-uniform in ``STEP_RANGE``.

    Args:
        weight: Projection to overwrite, (..., E, R).
        bias: Bias to overwrite, (..., E).
    """
    rank = weight.shape[-1]
    nn.init.uniform_(weight, -(rank**-0.5), rank**-0.5)
    low, high = (math.log(step) for step in STEP_RANGE)
    step = torch.empty_like(bias).uniform_(low, high).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))


def draw_linear(*layers: nn.Linear) -> None:
    """Draws the weights of linear layers from a normal distribution of deviation 0.02; biases become zero."""
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
