"""The Spatial-Mamba backbone.

Re-implemented from arXiv 2410.15091 (ICLR 2025) and from the behaviour of its published checkpoints, which load under
their own names (see `mmspatialmamba.checkpoint_names.spatial_mamba`).
"""

from typing import ClassVar

from mmengine.registry import MODELS as ROOT_MODELS

from ..checkpoint_names import SPATIAL_MAMBA
from ..registry import MODELS
from .backbone import Backbone
from .block import Block
from .fused import fuse
from .layers import MLP, Downsample, Stem, draw_linear
from .ssm import StructureAwareSSM


@ROOT_MODELS.register_module()
@MODELS.register_module()
class SpatialMamba(Backbone):
    """Spatial-Mamba with multi-scale outputs; its arguments are those of `Backbone`.

    Architectures are 'tiny', 'small' and 'base' ('t', 's', 'b'), or a dict with ``embed_dims`` and ``depths``.

    Args:
        arch: As in `Backbone`.
        fused: Whether `mmspatialmamba.fuse` makes one op of each branch of a block and of the wide convolutions of a
            downsample: less time and memory, but layers inside can be neither hooked nor replaced.
        arguments: Those of `Backbone`.
    """

    ARCHITECTURES: ClassVar[dict[str, dict]] = {
        'tiny': {'embed_dims': 64, 'depths': (2, 4, 8, 4)},
        'small': {'embed_dims': 64, 'depths': (2, 4, 21, 5)},
        'base': {'embed_dims': 96, 'depths': (2, 4, 21, 5)},
    }
    NAMES = SPATIAL_MAMBA
    CORE_OP = 'structure_aware_ssm'
    PUBLISHED = 'spatialmamba://cls_sm_{arch}'

    def __init__(self, arch: str | dict = 'tiny', *, fused: bool = False, **arguments):
        if not isinstance(fused, bool):
            raise TypeError(f'{type(self).__name__}: fused must be True or False, got {fused!r}')
        super().__init__(arch, **arguments)
        if fused:
            fuse(self)

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
                draw_linear(module.in_proj, module.out_proj)
            elif isinstance(module, MLP):
                draw_linear(module.fc1, module.fc2)
