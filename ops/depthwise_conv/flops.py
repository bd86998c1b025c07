"""Multiply-adds of the depthwise convolution."""

from collections import Counter
from math import prod


def depthwise_conv(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.depthwise_conv`, one for each tap; the shapes are those of its inputs and output."""
    return Counter(conv=prod(inputs[1][2:]) * prod(output))
