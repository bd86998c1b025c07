"""Multiply-adds of the state fusion."""

from collections import Counter
from math import prod

from .taps import TAP_OFFSETS


def state_fusion(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.state_fusion`, one for each tap; the shapes are those of its inputs and output."""
    return Counter(state_fusion=len(TAP_OFFSETS) * prod(output))
