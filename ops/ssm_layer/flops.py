"""Multiply-adds of the state space branch."""

from collections import Counter
from math import prod

from ..depthwise_conv.flops import depthwise_conv
from ..gated_norm.flops import NORM_OPERATIONS, gated_norm
from ..structure_aware_ssm.flops import structure_aware_ssm


def ssm_layer(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.ssm_layer`, the sum of its parts; the shapes are those of its inputs and output."""
    x, conv_weight, (inner, rank) = inputs[0], inputs[7], inputs[9]
    tokens = prod(output[:-1])
    wide, steps = (*output[:-1], inner), (*output[:-1], rank)
    products = sum(prod(weight) for weight in inputs[4:7]) * tokens
    return (
        Counter(layer_norm=NORM_OPERATIONS * prod(x), linear=products)
        + depthwise_conv([wide, conv_weight], wide)
        + structure_aware_ssm([wide, steps], wide)
        + gated_norm([wide, wide], wide)
    )
