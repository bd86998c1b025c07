"""The Spatial-Mamba backbone.

Re-implemented from arXiv 2410.15091 (ICLR 2025) and from the behaviour of its published checkpoints, which load under
their own names (see `mmspatialmamba.checkpoint_names.spatial_mamba`).
"""

from typing import ClassVar

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS as ROOT_MODELS

from ..checkpoint_names import SPATIAL_MAMBA
from ..registry import MODELS
from .backbone import Backbone
from .layers import MLP, DepthwiseConv, Downsample, LayerNorm, Stem
from .ssm import StructureAwareSSM


class Block(nn.Module):
    """Spatial-Mamba block: position encoding, SSM, position encoding, MLP, each added to its input.

    Args:
        channels: Number of channels d.
        drop_path_rate: Probability that the SSM or the MLP of an image is dropped in training.
    """

    def __init__(self, channels: int, drop_path_rate: float):
        super().__init__()
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


@ROOT_MODELS.register_module()
@MODELS.register_module()
class SpatialMamba(Backbone):
    """Spatial-Mamba with multi-scale outputs; its arguments are those of `Backbone`.

    Architectures are 'tiny', 'small' and 'base' ('t', 's', 'b'), or a dict with ``embed_dims`` and ``depths``.
    """

    ARCHITECTURES: ClassVar[dict[str, dict]] = {
        'tiny': {'embed_dims': 64, 'depths': (2, 4, 8, 4)},
        'small': {'embed_dims': 64, 'depths': (2, 4, 21, 5)},
        'base': {'embed_dims': 96, 'depths': (2, 4, 21, 5)},
    }
    NAMES = SPATIAL_MAMBA
    CORE_OP = 'structure_aware_ssm'

    def make_stem(self, in_channels: int, channels: int) -> Stem:
        """Returns the convolutions before the first stage."""
        return Stem(in_channels, channels)

    def make_block(self, channels: int, drop_path_rate: float) -> Block:
        """Returns a block."""
        return Block(channels, drop_path_rate)

    def make_downsample(self, channels: int) -> Downsample:
        """Returns what leads from one stage to the next."""
        return Downsample(channels)

    def reset_parameters(self) -> None:
        """Draws the weights of the linear layers of SSM and MLP from a normal distribution of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, StructureAwareSSM):
                linears = (module.in_proj, module.out_proj)
            elif isinstance(module, MLP):
                linears = (module.fc1, module.fc2)
            else:
                continue
            for linear in linears:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
