"""`SpatialMamba` under the name and with the arguments of the original code, so that its configs run as they are."""

from collections.abc import Sequence

from mmengine.registry import MODELS as ROOT_MODELS

from ..registry import MODELS
from .original_arguments import BuiltIn, first_width, take_arguments
from .spatial_mamba import SpatialMamba

BUILT_IN = {
    'd_state': BuiltIn((1,), 'the state fusion and all published models are defined on one state per channel'),
    'dt_init': BuiltIn(('random',), 'step sizes are drawn as in the published models'),
    'mlp_ratio': BuiltIn((4,), 'the MLP of a block has four times its channels'),
    'norm_layer': BuiltIn(('ln',), 'blocks and outputs have LayerNorm'),
    'patch_size': BuiltIn((4,), 'the stem has stride 4'),
    'drop_rate': BuiltIn((0,), 'there is no dropout beside drop path'),
    'attn_drop_rate': BuiltIn((0,), 'there is no dropout beside drop path'),
}
"""Arguments of the original that are no choice here."""


@ROOT_MODELS.register_module(name='MM_SpatialMamba')
@MODELS.register_module(name='MM_SpatialMamba')
class MMSpatialMamba(SpatialMamba):
    """`SpatialMamba` with the arguments of the original repository's ``MM_SpatialMamba``.

    New configs should use `SpatialMamba`, which refuses what it does not know. Here, keys of an inherited Swin or
    ResNet are listed in a warning and have no effect, as in the original.

    Args:
        out_indices: As in `SpatialMamba`.
        pretrained: Checkpoint of the backbone; None or an empty text for none. Unlike in the original, a file that is
            missing or does not match raises.
        dims: Channels of the first stage, or of all four, each twice the one before.
        depths: Number of blocks of each of the four stages.
        drop_path_rate: As in `SpatialMamba`.
        in_chans: Number of image channels.
        use_checkpoint: Whether blocks are computed again in backward to save memory.
        frozen_stages: As in `SpatialMamba`.
        norm_eval: As in `SpatialMamba`.
        with_cp: As ``use_checkpoint``.
        init_cfg: As in `SpatialMamba`.
        img_size: Without effect: images have any size.
        num_classes: Without effect: a backbone has no classifier.
        key: Without effect: the layout of a checkpoint is recognized.
        **others: Arguments with the value that is built in (`BUILT_IN`), and keys left over from an inherited backbone
            (`mmspatialmamba.models.original_arguments.WITHOUT_EFFECT`).

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has another value than the one that is built in.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        use_checkpoint: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        key: str = 'model',
        **others,
    ):
        ours = {'frozen_stages': frozen_stages, 'norm_eval': norm_eval, 'with_cp': with_cp, 'init_cfg': init_cfg}
        ours = take_arguments('MM_SpatialMamba', BUILT_IN, others, ours)
        ours['with_cp'] |= use_checkpoint
        width = first_width('MM_SpatialMamba', dims, len(self.STRIDES))
        super().__init__(
            arch={'embed_dims': width, 'depths': tuple(depths)},
            in_channels=in_chans,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            pretrained=pretrained or None,
            **ours,
        )
