"""`SpatialMamba` under the name and with the arguments of the original code, so that its configs run as they are."""

import logging
from collections.abc import Sequence

from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS

from ..registry import MODELS
from .spatial_mamba import SpatialMamba

BUILT_IN = {
    'd_state': (1, 'the state fusion and all published models are defined on one state per channel'),
    'dt_init': ('random', 'step sizes are drawn as in the published models'),
    'mlp_ratio': (4, 'the MLP of a block has four times its channels'),
    'norm_layer': ('ln', 'blocks and outputs have LayerNorm'),
    'patch_size': (4, 'the stem has stride 4'),
    'drop_rate': (0, 'there is no dropout beside drop path'),
    'attn_drop_rate': (0, 'there is no dropout beside drop path'),
}
"""Arguments of the original that are no choice here: the value that is built in, and why."""

WITHOUT_EFFECT = {
    'Swin': (
        'pretrain_img_size', 'embed_dims', 'window_size', 'num_heads', 'strides', 'qkv_bias', 'qk_scale', 'patch_norm',
        'use_abs_pos_embed', 'act_cfg', 'norm_cfg', 'convert_weights',
    ),
    'ResNet': (
        'depth', 'in_channels', 'stem_channels', 'base_channels', 'num_stages', 'strides', 'dilations', 'style',
        'deep_stem', 'avg_down', 'norm_cfg', 'conv_cfg', 'dcn', 'stage_with_dcn', 'plugins', 'zero_init_residual',
        'contract_dilation',
    ),
}  # fmt: skip
"""What a config has left over from the backbone that it inherits; the original ignored it."""

OURS = {'frozen_stages': -1, 'norm_eval': False, 'with_cp': False, 'init_cfg': None}
"""Arguments that the original had not, with their defaults: beside left-over keys they are the inherited backbone's."""


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
            (`WITHOUT_EFFECT`).

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
        for name in sorted(BUILT_IN.keys() & others.keys()):
            built_in, reason = BUILT_IN[name]
            value = others.pop(name)
            if (value.lower() if isinstance(value, str) else value) != built_in:
                raise ValueError(f'MM_SpatialMamba: {name} must be {built_in!r}, got {value!r}: {reason}')
        unknown = others.keys() - {name for names in WITHOUT_EFFECT.values() for name in names}
        if unknown:
            raise TypeError(
                f'MM_SpatialMamba: unknown argument {", ".join(sorted(unknown))}: neither one of the original nor left '
                'over from Swin or ResNet'
            )
        ours = {'frozen_stages': frozen_stages, 'norm_eval': norm_eval, 'with_cp': with_cp, 'init_cfg': init_cfg}
        if others:
            ignored = [name for name in OURS if ours[name] != OURS[name]]
            print_log(
                'MM_SpatialMamba: left over from an inherited backbone, without effect: '
                f'{", ".join(sorted(others) + ignored)}. With _delete_=True in the backbone, {", ".join(OURS)} are its '
                'own.',
                logger='current',
                level=logging.WARNING,
            )
            ours = dict(OURS)
        ours['with_cp'] |= use_checkpoint
        widths = [dims] if isinstance(dims, int) else list(dims)
        if len(widths) > 1 and widths != [widths[0] * 2**i for i in range(len(self.STRIDES))]:
            raise ValueError(f'MM_SpatialMamba: dims must double from stage to stage, got {dims}')
        super().__init__(
            arch={'embed_dims': widths[0], 'depths': tuple(depths)},
            in_channels=in_chans,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            pretrained=pretrained or None,
            **ours,
        )
