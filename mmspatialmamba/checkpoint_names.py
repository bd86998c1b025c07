"""Parameter names of published Spatial-Mamba checkpoints and of this project, both ways.

`OFFICIAL_TO_OWN` is the one table. `SpatialMamba` applies it to every state dict that it loads.
"""

import re
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

OFFICIAL_TO_OWN = (
    ('patch_embed.conv1', 'stem.reduce'),
    ('patch_embed.conv2.0', 'stem.residual.0'),
    ('patch_embed.conv2.1', 'stem.residual.2'),
    ('patch_embed.conv3.0', 'stem.expand'),
    ('patch_embed.conv3.1', 'stem.project'),
    ('layers.{i}.blocks.{j}.ln_1', 'stages.{i}.blocks.{j}.norm1'),
    ('layers.{i}.blocks.{j}.ln_2', 'stages.{i}.blocks.{j}.norm2'),
    ('layers.{i}.blocks.{j}.self_attention.conv2d', 'stages.{i}.blocks.{j}.ssm.dwconv'),
    ('layers.{i}.blocks.{j}.self_attention.x_proj_weight', 'stages.{i}.blocks.{j}.ssm.x_proj.weight'),
    ('layers.{i}.blocks.{j}.self_attention.dt_projs_weight', 'stages.{i}.blocks.{j}.ssm.dt_weight'),
    ('layers.{i}.blocks.{j}.self_attention.dt_projs_bias', 'stages.{i}.blocks.{j}.ssm.dt_bias'),
    ('layers.{i}.blocks.{j}.self_attention.A_logs', 'stages.{i}.blocks.{j}.ssm.A_log'),
    ('layers.{i}.blocks.{j}.self_attention.Ds', 'stages.{i}.blocks.{j}.ssm.D'),
    ('layers.{i}.blocks.{j}.self_attention.out_norm', 'stages.{i}.blocks.{j}.ssm.norm'),
    (
        'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3',
        'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d1',
    ),
    (
        'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3_1',
        'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d3',
    ),
    (
        'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3_2',
        'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d5',
    ),
    ('layers.{i}.blocks.{j}.self_attention', 'stages.{i}.blocks.{j}.ssm'),
    ('layers.{i}.downsample.conv.0.conv', 'stages.{i}.downsample.expand'),
    ('layers.{i}.downsample.conv.1.conv', 'stages.{i}.downsample.dwconv'),
    ('layers.{i}.downsample.conv.2', 'stages.{i}.downsample.project'),
    ('layers.{i}', 'stages.{i}'),
    ('outnorm{i}', 'out_norms.{i}'),
)
"""Pairs (official, own) of name prefixes that end at a dot; {i} and {j} are numbers. The first that fits is applied."""

CLASSIFIER_NORM = 'norm'
"""Official name of a classifier's last norm: the output norm of the last stage when that stage alone is returned."""

BACKBONE_PREFIX = 'backbone.'


def to_own(name: str) -> str:
    """Returns this project's name of a parameter with an official name; other names are returned unchanged."""
    return _rename(name, _TO_OWN)


def to_official(name: str) -> str:
    """Returns the official name of a parameter with this project's name; other names are returned unchanged."""
    return _rename(name, _TO_OFFICIAL)


@dataclass(frozen=True)
class LoadReport:
    """How a state dict fits a backbone.

    Attributes:
        expected: Number of tensors of the backbone.
        matched: Names of tensors that are present with the right shape.
        missing: Names of the backbone's tensors that the state dict lacks.
        unexpected: Names in the state dict that the backbone lacks, as given.
        mismatched: Names whose shape differs, with both shapes.
    """

    expected: int
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def describe(self, source: str | None) -> str:
        """Returns the report as text, one kind of tensor a line.

        Args:
            source: The file, if the state dict was read from one.
        """
        subject = f'SpatialMamba: {source}' if source else 'SpatialMamba: the state dict'
        if not self.matched:
            found = ', '.join((self.mismatched + self.unexpected)[:3]) or 'no tensor under the name of the backbone'
            return (
                f'{subject} matches nothing: expected {self.expected} tensors such as '
                f'{", ".join(self.missing[:3])} or their official names, found {found}. A file of backbone or '
                "classification weights is loaded by init_cfg=dict(type='Pretrained', checkpoint=…) of the backbone."
            )
        lines = [
            f'{subject}: {len(self.matched)} of {self.expected} tensors matched, {len(self.missing)} missing, '
            f'{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape.'
        ]
        for kind in ('missing', 'unexpected', 'mismatched'):
            names = getattr(self, kind)
            if names:
                lines.append(f'  {kind}: {", ".join(names)}')
        return '\n'.join(lines)


def adapt_state_dict(
    state_dict: MutableMapping, prefix: str, own: dict[str, torch.Size], classifier: bool
) -> LoadReport:
    """Renames a state dict in place to this project's names.

    A state dict of a whole model, whose backbone lies under ``backbone.``, is reduced to that part when the backbone
    itself is what loads it (``prefix`` is empty).

    Args:
        state_dict: State dict with official or own names.
        prefix: What the names of the backbone's tensors begin with.
        own: Shape of each tensor of the backbone, by its name with the prefix.
        classifier: Whether the last stage is the only output, so that a classifier's last norm belongs to it.

    Returns:
        What matched.
    """
    outside = []
    if not prefix and any(name.startswith(BACKBONE_PREFIX) for name in state_dict):
        for name in list(state_dict):
            tensor = state_dict.pop(name)
            if name.startswith(BACKBONE_PREFIX):
                state_dict[name.removeprefix(BACKBONE_PREFIX)] = tensor
            else:
                outside.append(name)

    given = {}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        official = name.removeprefix(prefix)
        if classifier and official.startswith(f'{CLASSIFIER_NORM}.'):
            official = f'outnorm3{official.removeprefix(CLASSIFIER_NORM)}'
        renamed = prefix + to_own(official)
        given[renamed] = name
        state_dict[renamed] = state_dict.pop(name)

    matched, mismatched = [], []
    for name, shape in own.items():
        if name in given:
            found = tuple(getattr(state_dict[name], 'shape', ()))
            if found == tuple(shape):
                matched.append(name)
            else:
                mismatched.append(f'{name} (expected {tuple(shape)}, found {found})')
    missing = [name for name in own if name not in given and not name.endswith('num_batches_tracked')]
    unexpected = [name for renamed, name in given.items() if renamed not in own] + outside
    return LoadReport(len(own), matched, missing, unexpected, mismatched)


def _compile(source: str, target: str) -> tuple[re.Pattern, str]:
    pattern = re.escape(source).replace(r'\{i\}', r'(?P<i>\d+)').replace(r'\{j\}', r'(?P<j>\d+)')
    return re.compile(rf'{pattern}(?=\.|$)'), target.replace('{i}', r'\g<i>').replace('{j}', r'\g<j>')


_TO_OWN = [_compile(official, own) for official, own in OFFICIAL_TO_OWN]
_TO_OFFICIAL = [_compile(own, official) for official, own in OFFICIAL_TO_OWN]


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, target in rules:
        match = pattern.match(name)
        if match:
            return match.expand(target) + name[match.end() :]
    return name
