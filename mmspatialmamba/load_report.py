"""Fits a state dict to a backbone: gives it the names and shapes of the backbone's table and says what matched."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from .checkpoint_names import BACKBONE_PREFIX, NameTable


@dataclass(frozen=True)
class LoadReport:
    """How a state dict fits a backbone.

    Attributes:
        expected: Number of entries of the backbone.
        matched: Names of entries that are present with the right shape.
        missing: Names of the backbone's entries that the state dict lacks.
        unexpected: Names in the state dict that the backbone lacks, as given.
        mismatched: Names whose shape differs, with both shapes.
        is_published: Whether the state dict is in the published layout of the backbone.
    """

    expected: int
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    is_published: bool

    @property
    def absent(self) -> bool:
        """Whether the state dict has no name under the backbone's prefix."""
        return not (self.matched or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """Returns the counts as text, and the names of what does not fit, one kind a line."""
        if not self.matched:
            found = ', '.join((self.mismatched + self.unexpected)[:3]) or 'none'
            return (
                f'matches nothing: expected {self.expected} tensors such as {", ".join(self.missing[:3])} or their '
                f'official names, found {found}. A file of backbone or classification weights is loaded by '
                "init_cfg=dict(type='Pretrained', checkpoint=…) of the backbone."
            )
        lines = [
            f'{len(self.matched)} of {self.expected} tensors matched, {len(self.missing)} missing, '
            f'{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape.'
        ]
        for kind in ('missing', 'unexpected', 'mismatched'):
            names = getattr(self, kind)
            if names:
                lines.append(f'  {kind}: {", ".join(names)}')
        return '\n'.join(lines)


def fit_state_dict(
    state_dict: MutableMapping, prefix: str, own: Mapping[str, object], table: NameTable, classifier: bool
) -> LoadReport:
    """Gives a state dict in place this project's names and shapes, if it is in the published layout of the backbone.

    A state dict of a whole model, whose backbone lies under ``backbone.``, is reduced to that part when the backbone
    itself is what loads it (``prefix`` is empty).

    Args:
        state_dict: State dict with official or own names.
        prefix: What the names of the backbone's entries begin with.
        own: The backbone's own state dict, without the prefix: tensors, and whatever else a module stores there, such
            as the packed parameters of quantized layers.
        table: The backbone's names.
        classifier: Whether the last stage is the only output, so that a classifier's last norm belongs to it.

    Returns:
        What matched.
    """
    outside = []
    if not prefix and any(name.startswith(BACKBONE_PREFIX) for name in state_dict):
        for name in list(state_dict):
            value = state_dict.pop(name)
            if name.startswith(BACKBONE_PREFIX):
                state_dict[name.removeprefix(BACKBONE_PREFIX)] = value
            else:
                outside.append(name)

    given = {name: name for name in state_dict if name.startswith(prefix)}
    is_published = table.is_official(given, prefix)
    if is_published:
        own_names = {table.to_own(name.removeprefix(prefix), classifier): name for name in given}
        given = {prefix + name: official for name, official in own_names.items()}
        values = [(name, state_dict.pop(official)) for name, official in own_names.items()]
        state_dict.update([(prefix + name, table.to_own_value(name, value)) for name, value in values])

    matched, mismatched = [], []
    for name, value in own.items():
        name = prefix + name
        if name not in given:
            continue
        expected, found = _kind(value), _kind(state_dict[name])
        if expected == found:
            matched.append(name)
        else:
            mismatched.append(f'{name} (expected {expected}, found {found})')
    names = dict.fromkeys(prefix + name for name in own)
    missing = [name for name in names if name not in given and not name.endswith('num_batches_tracked')]
    unexpected = [name for renamed, name in given.items() if renamed not in names] + outside
    return LoadReport(len(own), matched, missing, unexpected, mismatched, is_published)


def _kind(value: object) -> tuple[int, ...] | str:
    """Returns what must agree: the shape of a tensor, of anything else its type."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
