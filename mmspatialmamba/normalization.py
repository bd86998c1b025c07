"""What the published weights expect of images, and how a config is made to give it to them."""

import logging
from collections.abc import Iterator

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from .config_types import type_name

MEAN = [123.675, 116.28, 103.53]
"""Mean of ImageNet's red, green and blue, of 0 to 255."""

STD = [58.395, 57.12, 57.375]
"""Standard deviation of ImageNet's red, green and blue."""


def normalize_as_pretrained(cfg: Config, in_channels: int) -> None:
    """Gives every data preprocessor mean, deviation and channel order of ImageNet weights, and logs what changes.

    Where images are normalized in the pipeline, or have other than three channels, nothing is changed, and the log says
    what the weights expect.

    Args:
        cfg: Config of a toolbox; changed in place.
        in_channels: Image channels of the backbone.
    """
    preprocessors = [part for part in _parts_named('data_preprocessor', cfg) if 'data_preprocessor' not in part]
    in_pipeline = any(type_name(part) == 'Normalize' for part in _parts(cfg))
    if in_channels != len(MEAN) or in_pipeline or not preprocessors:
        where = (
            'in the pipeline' if in_pipeline else f'with {in_channels} channels' if preprocessors else 'unknown to us'
        )
        print_log(
            f'swap_backbone: the pretrained weights expect RGB images of mean {MEAN} and deviation {STD}. Images here '
            f'are normalized {where}, which was not changed: compare.',
            logger='current',
            level=logging.WARNING,
        )
        return
    changes = set()
    for part in preprocessors:
        to_rgb = 'to_rgb' if 'to_rgb' in part or cfg.get('default_scope') == 'mmpretrain' else 'bgr_to_rgb'
        wanted = {'mean': MEAN, 'std': STD, to_rgb: True}
        former = {key: part.get(key) for key in wanted}
        if part.get('rgb_to_bgr'):
            former['rgb_to_bgr'] = True
            part.rgb_to_bgr = False
        if {key: _listed(value) for key, value in former.items()} == wanted:
            continue
        part.update(wanted)
        changes.add(f'{wanted} in place of {former}')
    for change in sorted(changes):
        print_log(
            f'swap_backbone: images are normalized as the pretrained weights expect it: {change}',
            logger='current',
            level=logging.WARNING,
        )


def _parts(value: object) -> Iterator[ConfigDict]:
    """Yields every dict inside of a config."""
    if isinstance(value, (Config, dict)):
        if isinstance(value, dict):
            yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _parts(inner)


def _parts_named(key: str, cfg: Config) -> list[ConfigDict]:
    """Returns every dict that stands under ``key``, at the top of a config or inside of its model."""
    found = [part[key] for part in (cfg, *_parts(cfg.get('model'))) if isinstance(part.get(key), dict)]
    return list({id(part): part for part in found}.values())


def _listed(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value
