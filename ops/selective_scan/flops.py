"""Multiply-adds of the scan in several orders."""

from collections import Counter
from math import prod


def selective_scan(inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> Counter:
    """Counts `mmspatialmamba.ops.selective_scan`; the shapes are those of the op's inputs and of its output.

    Per position, channel and order: R for the step size; ``delta u`` and, for each state, ``delta A``, the product with
    ``B`` and ``a h + b``; for each state ``h C``, and the sum with ``D u``.
    """
    (orders, rank), states = inputs[1][-2:], inputs[2][-1]
    elements = orders * prod(output)
    return Counter(
        step_size=rank * elements, scan_states=(1 + 3 * states) * elements, observation=(1 + states) * elements
    )
