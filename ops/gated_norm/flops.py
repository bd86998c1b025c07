"""Multiply-adds of the gated norm."""

from collections import Counter
from math import prod

NORM_OPERATIONS = 5
"""MMEngine's estimate for a norm with scale and shift, per element."""


def gated_norm(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.gated_norm`, its norm alone; the shapes are those of its inputs and output."""
    return Counter(layer_norm=NORM_OPERATIONS * prod(output))
