"""How the backbones under the names of the original repositories take the arguments of those."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmengine.logging import print_log

WITHOUT_EFFECT = {
    'Swin': (
        'pretrain_img_size', 'embed_dims', 'window_size', 'num_heads', 'strides', 'qkv_bias', 'qk_scale', 'patch_norm',
        'use_abs_pos_embed', 'drop_rate', 'attn_drop_rate', 'act_cfg', 'norm_cfg', 'convert_weights',
    ),
    'ResNet': (
        'depth', 'in_channels', 'stem_channels', 'base_channels', 'num_stages', 'strides', 'dilations', 'style',
        'deep_stem', 'avg_down', 'norm_cfg', 'conv_cfg', 'dcn', 'stage_with_dcn', 'plugins', 'zero_init_residual',
        'contract_dilation',
    ),
}  # fmt: skip
"""What a config has left over from the backbone that it inherits; the originals ignored it."""

OURS = {'frozen_stages': -1, 'norm_eval': False, 'with_cp': False, 'init_cfg': None}
"""Arguments that the originals lacked, with their defaults: beside left-over keys they are the inherited backbone's."""


class BuiltIn(NamedTuple):
    """An argument of the original that is no choice here.

    Attributes:
        values: What it may be; text in lower case.
        reason: Why.
        default: What the original took where it was not given; None for the first of ``values``.
    """

    values: tuple
    reason: str
    default: object = None


def take_arguments(
    name: str, built_in: Mapping[str, BuiltIn], others: Mapping[str, object], ours: Mapping[str, object]
) -> dict[str, object]:
    """Checks arguments that are no choice, and says which are left over from an inherited backbone.

    Args:
        name: Name of the backbone, for messages.
        built_in: Arguments that are no choice, by name.
        others: What was given beside the arguments that are a choice.
        ours: What was given for the arguments in `OURS`.

    Returns:
        Arguments in `OURS`, as given, or their defaults if there are left-over keys.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has another value than the one that is built in.
    """
    for argument, (values, reason, default) in sorted(built_in.items()):
        value = others.get(argument, values[0] if default is None else default)
        if (value.lower() if isinstance(value, str) else value) not in values:
            allowed = ' or '.join(map(repr, values))
            given = repr(value) if argument in others else f"none, for which the original's default is {value!r}"
            raise ValueError(f'{name}: {argument} must be {allowed}, got {given}: {reason}')
    left_over = others.keys() - built_in.keys()
    unknown = left_over - {key for keys in WITHOUT_EFFECT.values() for key in keys}
    if unknown:
        raise TypeError(
            f'{name}: unknown argument {", ".join(sorted(unknown))}: neither one of the original nor left over from '
            'Swin or ResNet'
        )
    if not left_over:
        return dict(ours)
    ignored = [argument for argument in OURS if ours[argument] != OURS[argument]]
    print_log(
        f'{name}: left over from an inherited backbone, without effect: {", ".join(sorted(left_over) + ignored)}. With '
        f'_delete_=True in the backbone, {", ".join(OURS)} are its own.',
        logger='current',
        level=logging.WARNING,
    )
    return dict(OURS)


def first_width(name: str, dims: int | Sequence[int], stages: int) -> int:
    """Returns the channels of the first stage from those of it, or of all stages, each twice the one before.

    Raises:
        ValueError: They do not double from stage to stage.
    """
    widths = [dims] if isinstance(dims, int) else list(dims)
    if len(widths) > 1 and widths != [widths[0] * 2**i for i in range(stages)]:
        raise ValueError(f'{name}: dims must double from stage to stage, got {dims}')
    return widths[0]
