"""Multiply-adds of the scan."""

from collections import Counter
from math import prod

OPERATIONS = 4
"""Per token and channel: ``delta A``, ``delta u``, its product with ``B``, ``a h + b``."""


def scan_states(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.scan_states`; the shapes are those of the op's inputs and of its output."""
    return Counter(scan_states=OPERATIONS * prod(output))
