"""Multiply-adds of the wide convolutions of a downsample."""

from collections import Counter
from math import prod

from ..depthwise_conv.flops import depthwise_conv


def downsample(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.downsample`, its two convolutions; the shapes are those of its inputs and output."""
    x, weight, _, conv_weight, _ = inputs
    wide = (*x[:-1], weight[0])
    return Counter(conv=prod(wide) * x[-1]) + depthwise_conv([wide, conv_weight], output)
