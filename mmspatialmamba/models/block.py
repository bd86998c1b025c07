"""A block of Spatial-Mamba."""

import torch
import torch.nn as nn

from .layers import MLP, DepthwiseConv, DropPath, LayerNorm
from .ssm import StructureAwareSSM


class Block(nn.Module):
    """Spatial-Mamba block: position encoding, SSM, position encoding, MLP, each added to its input.

    Args:
        channels: Number of channels d.
        drop_path_rate: Probability that the SSM or the MLP of an image is dropped in training.
    """

    def __init__(self, channels: int, drop_path_rate: float):
        super().__init__()
        self.channels = channels
        self.cpe1 = DepthwiseConv(channels, residual=True)
        self.norm1 = LayerNorm(channels)
        self.ssm = StructureAwareSSM(channels)
        self.cpe2 = DepthwiseConv(channels, residual=True)
        self.norm2 = LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.ssm(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))
