"""Multiply-adds of LayerNorm."""

from collections import Counter
from math import prod


def layer_norm(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.layer_norm` as MMEngine does: 5 for each element, 4 without a weight.

    The shapes are those of its inputs and output.
    """
    return Counter(layer_norm=(5 if inputs[1] else 4) * prod(output))
