"""The table of one backbone's parameter names: published and own."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import torch

BACKBONE_PREFIX = 'backbone.'
"""What the names of a backbone begin with in the models of the toolboxes."""


class NameTable:
    """Names of a backbone's parameters in its published files ("official") and in this project ("own"), both ways.

    Patterns are beginnings of names that end at a dot; ``{i}`` and ``{j}`` are numbers.

    Args:
        pairs: Pairs (official, own) of patterns. The first that fits a name is applied.
        signature: A pair (official, own) that each file of this backbone has, and no file of another network: it says
            whether a state dict is of this backbone, and in which layout.
        stem: Own name of the one parameter whose shape depends on the number of image channels.
        classifier_norm: Official name of a classifier's last norm, which is the output norm of the last stage when that
            stage alone is returned.
        classifier_head: Official name of a classifier's linear layer.
        linear: Patterns of own names of linear layers' weights, (out, in), which some files hold as the kernels of 1x1
            convolutions, (out, in, 1, 1).
        stacked: Patterns of own names of linear layers' weights, (parts · out, in), which published files hold as
            (parts, out, in), with the number of parts.
        find_relative: Given the entries of a state dict, returns why they are those of another network with names such
            as these, or None.
    """

    NORMS = 'out_norms.'
    """What own names of output norms begin with, in every backbone."""

    LAST_NORM = 'out_norms.3'
    """Own name of the output norm of the last stage, in every backbone."""

    TOOLBOX_HEAD = 'head.fc'
    """Name of the linear layer of an mmpretrain ``ImageClassifier``."""

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        signature: tuple[str, str],
        stem: str,
        classifier_norm: str,
        classifier_head: str,
        linear: Sequence[str] = (),
        stacked: Mapping[str, int] | None = None,
        find_relative: Callable[[Mapping[str, object]], str | None] = lambda entries: None,
    ):
        self.pairs = tuple(pairs)
        self.signature = signature
        self.stem = stem
        self.find_relative = find_relative
        self._linear = [_compile(pattern) for pattern in (*linear, f'{self.TOOLBOX_HEAD}.weight')]
        self._stacked = {_compile(pattern): parts for pattern, parts in (stacked or {}).items()}
        self._norm = (classifier_norm, self.LAST_NORM)
        self._head = (classifier_head, self.TOOLBOX_HEAD)
        self._official, self._own = (_compile(pattern) for pattern in signature)
        self._anywhere = [re.compile(rf'(?:.*\.)?{pattern.pattern}') for pattern in (self._official, self._own)]

    def to_own(self, name: str, classifier: bool = False) -> str:
        """Returns the own name of a parameter with an official name; other names are returned unchanged.

        Args:
            name: Name, without the prefix of the backbone.
            classifier: Whether a classifier's last norm belongs to the backbone.
        """
        return _rename(name, [self._norm, *self.pairs] if classifier else self.pairs)

    def to_official(self, name: str, classifier: bool = False) -> str:
        """Returns the official name of a parameter with an own name: the inverse of `to_own`."""
        pairs = [self._norm, *self.pairs] if classifier else self.pairs
        return _rename(name, [(own, official) for official, own in pairs])

    def to_own_value(self, name: str, value: object) -> object:
        """Returns the value of a published entry in the shape that it has here.

        Args:
            name: Own name, without the prefix of the backbone, or that of a classifier's head in a model of a toolbox;
                values of other names are returned unchanged.
            value: Tensor, or whatever else a state dict holds.
        """
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == 4 and value.shape[2:] == (1, 1) and any(pattern.match(name) for pattern in self._linear):
            value = value.flatten(1)
        if value.ndim == 3 and value.shape[0] == self._parts(name):
            value = value.flatten(0, 1)
        return value

    def to_official_value(self, name: str, value: object) -> object:
        """Returns a value in the shape that it has in published files: the inverse of `to_own_value`."""
        parts = self._parts(name)
        return value.unflatten(0, (parts, -1)) if parts and isinstance(value, torch.Tensor) else value

    def _parts(self, name: str) -> int | None:
        return next((parts for pattern, parts in self._stacked.items() if pattern.match(name)), None)

    def to_toolbox(self, name: str) -> str:
        """Returns where a parameter of a published classifier, which has no prefix, lies in a model of a toolbox."""
        renamed = _rename(name, [self._head])
        return BACKBONE_PREFIX + name if renamed == name else renamed

    def from_toolbox(self, name: str) -> str:
        """Returns the name without prefix of a classifier's parameter: the inverse of `to_toolbox`."""
        return _rename(name, [self._head[::-1]]).removeprefix(BACKBONE_PREFIX)

    def is_official(self, names: Iterable[str], prefix: str = '') -> bool:
        """Returns whether the names under ``prefix`` are those of a published file of this backbone."""
        return any(name.startswith(prefix) and self._official.match(name, len(prefix)) for name in names)

    def is_classifier(self, names: Iterable[str]) -> bool:
        """Returns whether the names are those of a published classifier, whose backbone has no prefix."""
        names = list(names)
        return self.is_official(names) and any(_compile(self._norm[0]).match(name) for name in names)

    def is_own(self, names: Iterable[str], prefix: str = '') -> bool:
        """Returns whether the names under ``prefix`` are those that this project gives to this backbone."""
        return any(name.startswith(prefix) and self._own.match(name, len(prefix)) for name in names)

    def fits(self, names: Iterable[str]) -> bool:
        """Returns whether this backbone is among the names, in either layout and under any prefix."""
        return any(pattern.match(name) for name in names for pattern in self._anywhere)


@cache
def _compile(pattern: str) -> re.Pattern:
    escaped = re.escape(pattern).replace(r'\{i\}', r'(?P<i>\d+)').replace(r'\{j\}', r'(?P<j>\d+)')
    return re.compile(rf'{escaped}(?=\.|$)')


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for source, target in pairs:
        match = _compile(source).match(name)
        if match:
            return target.format(**match.groupdict()) + name[match.end() :]
    return name
