"""What the ops cost, for MMEngine's complexity analysis.

MMEngine counts one operation per multiply-add, and nothing for an op that it does not know. `register` makes the ops
of this package known to it, so that its `get_model_complexity_info` and the tools of the toolboxes count them. A
product counts as a multiply-add without the addition; exp and softplus count nothing, as activations in MMEngine. A
depthwise convolution and a norm count what MMEngine counts for PyTorch's own: 9 and 5 for each element.

Per token and inner channel, with R the rank of the step size:

| part | multiply-adds | of |
| --- | --- | --- |
| step size | R | ``dt · dt_weight`` |
| scan | 4 | ``delta A``, ``delta u``, its product with ``B``, ``a h + b`` |
| state fusion | 25 | one for each tap |
| observation | 2 | ``g C``, its sum with ``D u`` |

The figures published with the paper come out to their last digit, all of them, with 36 + R in place of this 31 + R:
9 for the scan, 27 for the three dilated kernels before they are merged, nothing for the observation. That is at most
0.3 % more of a whole model, and inferred from the figures.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from math import prod

from mmengine.analysis import complexity_analysis

from .ops.state_fusion import TAP_OFFSETS

SCAN_OPERATIONS = 4
"""Multiply-adds of the selective scan per token and channel."""

OBSERVATION_OPERATIONS = 2
"""Multiply-adds of the observation per token and channel."""

NORM_OPERATIONS = 5
"""MMEngine's estimate for a norm with scale and shift, per element."""


def count_selective_scan(inputs: list, outputs: list) -> Counter:
    """Counts `mmspatialmamba.ops.selective_scan`: 4 for each element of the state.

    Args:
        inputs: The traced op's inputs, ``torch._C.Value`` with shapes, as MMEngine passes them.
        outputs: Its outputs.

    Returns:
        Number of multiply-adds by part.
    """
    return Counter(selective_scan=SCAN_OPERATIONS * prod(_shape(outputs[0])))


def count_state_fusion(inputs: list, outputs: list) -> Counter:
    """Counts `mmspatialmamba.ops.state_fusion`: one for each tap and element. See `count_selective_scan`."""
    return Counter(state_fusion=len(TAP_OFFSETS) * prod(_shape(outputs[0])))


def count_structure_aware_ssm(inputs: list, outputs: list) -> Counter:
    """Counts `mmspatialmamba.ops.structure_aware_ssm`: the sum of its four parts. See `count_selective_scan`."""
    rank, elements = _shape(inputs[1])[-1], prod(_shape(outputs[0]))
    scan_and_fusion = count_selective_scan(inputs, outputs) + count_state_fusion(inputs, outputs)
    return scan_and_fusion + Counter(step_size=rank * elements, observation=OBSERVATION_OPERATIONS * elements)


def count_depthwise_conv(inputs: list, outputs: list) -> Counter:
    """Counts `mmspatialmamba.ops.depthwise_conv`: one for each tap and element. See `count_selective_scan`."""
    return Counter(conv=prod(_shape(inputs[1])[2:]) * prod(_shape(outputs[0])))


def count_gated_norm(inputs: list, outputs: list) -> Counter:
    """Counts `mmspatialmamba.ops.gated_norm`: its LayerNorm, as MMEngine does. See `count_selective_scan`."""
    return Counter(layer_norm=NORM_OPERATIONS * prod(_shape(outputs[0])))


HANDLES: dict[str, Callable[[list, list], Counter]] = {
    'mmspatialmamba::depthwise_conv': count_depthwise_conv,
    'mmspatialmamba::gated_norm': count_gated_norm,
    'mmspatialmamba::selective_scan': count_selective_scan,
    'mmspatialmamba::state_fusion': count_state_fusion,
    'mmspatialmamba::structure_aware_ssm': count_structure_aware_ssm,
}
"""Counter of each op by its traced name, for ``FlopAnalyzer.set_op_handle``."""

PARTS = ('step_size', 'selective_scan', 'state_fusion', 'observation')
"""Names under which the counters report."""


def register() -> None:
    """Makes the ops known to every `FlopAnalyzer` that MMEngine and the toolboxes create.

    MMEngine has no public way for that: where its table of ops is missing, a warning says that counts leave ours out.
    """
    table = getattr(complexity_analysis, '_DEFAULT_SUPPORTED_FLOP_OPS', None)
    if table is None:
        warnings.warn(
            'mmspatialmamba: this MMEngine has no mmengine.analysis.complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, '
            'so its FLOP counts leave out scan and fusion; tools/get_flops.py counts them.',
            stacklevel=2,
        )
        return
    table.update(HANDLES)


def _shape(value) -> list[int]:
    return value.type().sizes()
