"""A block of Spatial-Mamba, and the blocks of one stride."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch.utils.checkpoint import checkpoint

from .layers import MLP, DepthwiseConv, Downsample
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
        self.norm1 = nn.LayerNorm(channels)
        self.ssm = StructureAwareSSM(channels)
        self.cpe2 = DepthwiseConv(channels, residual=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.ssm(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one stride, and the downsample to the next stride if there is one.

    Args:
        channels: Number of channels d.
        drop_path_rates: Drop-path rate of each block.
        downsample: Whether another stage follows.
    """

    def __init__(self, channels: int, drop_path_rates: Sequence[float], downsample: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, rate) for rate in drop_path_rates)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: torch.Tensor, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the map of this stage and the input of the next.

        Args:
            x: Map, (N, H, W, d).
            recompute: Whether the blocks are computed again in backward, to save memory.

        Returns:
            The map after the blocks, (N, H, W, d), and after the downsample, (N, ceil(H/2), ceil(W/2), 2d), or None if
            there is none.
        """
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x, None if self.downsample is None else self.downsample(x)
