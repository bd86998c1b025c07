"""Multiply-adds of the fused core."""

from collections import Counter
from math import prod

from ..scan_states.flops import scan_states
from ..state_fusion.flops import state_fusion

OBSERVATION_OPERATIONS = 2
"""Per token and channel: ``g C``, its sum with ``D u``."""


def structure_aware_ssm(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.structure_aware_ssm`, the sum of its four parts; see `scan_states` for the shapes."""
    rank, elements = inputs[1][-1], prod(output)
    own = Counter(step_size=rank * elements, observation=OBSERVATION_OPERATIONS * elements)
    return scan_states(inputs, output) + state_fusion(inputs, output) + own
