"""Parameter names of published VMamba checkpoints and of this project, both ways."""

import re
from collections.abc import Mapping

import torch

from .table import NameTable

BLOCK = 'stages.{i}.blocks.{j}'


def find_first_generation(entries: Mapping[str, object]) -> str | None:
    """Returns why a state dict is of VMamba's first generation or of a variant between the two, or None.

    Args:
        entries: State dict, its names under any prefix.
    """
    for name, value in entries.items():
        mixer = re.fullmatch(r'((?:.*\.)?layers\.\d+\.blocks\.\d+\.(?:op|self_attention))\.A_logs', name)
        if not mixer or not isinstance(value, torch.Tensor) or value.ndim != 2:
            continue
        found = [f'state size {value.shape[1]}'] if value.shape[1] != 1 else []
        into, conv = (entries.get(f'{mixer[1]}.{layer}.weight') for layer in ('in_proj', 'conv2d'))
        # Spatial-Mamba has a gate too, but one order.
        if None not in (into, conv) and (len(into), len(value)) == (2 * len(conv), 4 * len(conv)):
            found.append('a gate')
        if found:
            return (
                f'{name} belongs to another VMamba, with {" and ".join(found)}, such as those of its first generation; '
                'expected one with state size 1 and no gate (v05_noz)'
            )
    return None


VMAMBA = NameTable(
    pairs=(
        ('patch_embed.0', 'stem.conv1'),
        ('patch_embed.2', 'stem.norm1'),
        ('patch_embed.5', 'stem.conv2'),
        ('patch_embed.7', 'stem.norm2'),
        ('layers.{i}.blocks.{j}.norm', f'{BLOCK}.norm1'),
        ('layers.{i}.blocks.{j}.op.conv2d', f'{BLOCK}.ss2d.dwconv'),
        ('layers.{i}.blocks.{j}.op.x_proj_weight', f'{BLOCK}.ss2d.x_proj.weight'),
        ('layers.{i}.blocks.{j}.op.dt_projs_weight', f'{BLOCK}.ss2d.dt_weight'),
        ('layers.{i}.blocks.{j}.op.dt_projs_bias', f'{BLOCK}.ss2d.dt_bias'),
        ('layers.{i}.blocks.{j}.op.A_logs', f'{BLOCK}.ss2d.A_log'),
        ('layers.{i}.blocks.{j}.op.Ds', f'{BLOCK}.ss2d.D'),
        ('layers.{i}.blocks.{j}.op.out_norm', f'{BLOCK}.ss2d.norm'),
        ('layers.{i}.blocks.{j}.op', f'{BLOCK}.ss2d'),
        ('layers.{i}.downsample.1', 'stages.{i}.downsample.conv'),
        ('layers.{i}.downsample.3', 'stages.{i}.downsample.norm'),
        ('layers.{i}', 'stages.{i}'),
        ('outnorm{i}', 'out_norms.{i}'),
    ),
    signature=('layers.{i}.blocks.{j}.op.x_proj_weight', f'{BLOCK}.ss2d.dt_weight'),
    stem='stem.conv1.weight',
    classifier_norm='classifier.norm',
    classifier_head='classifier.head',
    linear=tuple(f'{BLOCK}.{layer}.weight' for layer in ('ss2d.in_proj', 'ss2d.out_proj', 'mlp.fc1', 'mlp.fc2')),
    stacked={f'{BLOCK}.ss2d.x_proj.weight': 4},
    find_relative=find_first_generation,
)
