"""Multiply-adds of the MLP branch."""

from collections import Counter
from math import prod

from ..gated_norm.flops import NORM_OPERATIONS


def mlp(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.mlp`, its norm and its two products; the shapes are those of its inputs and output."""
    hidden = inputs[4][0]
    elements = prod(output)
    return Counter(layer_norm=NORM_OPERATIONS * elements, linear=2 * hidden * elements)
