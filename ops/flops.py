"""What the ops cost, in multiply-adds by part, from the shapes of their inputs and of their output.

A product counts as a multiply-add without the addition; exp and softplus count nothing. A depthwise convolution and a
norm count what MMEngine counts for PyTorch's own: 9 and 5 for each element.

Per token and inner channel, with R the rank of the step size:

| part | multiply-adds | of |
| --- | --- | --- |
| step size | R | ``dt · dt_weight`` |
| scan | 4 | ``delta A``, ``delta u``, its product with ``B``, ``a h + b`` |
| state fusion | 25 | one for each tap |
| observation | 2 | ``g C``, its sum with ``D u`` |

`selective_scan` counts the same parts but the fusion for each of its orders, with its states.

The figures published with the paper come out to their last digit, all of them, with 36 + R in place of this 31 + R:
9 for the scan, 27 for the three dilated kernels before they are merged, nothing for the observation. That is at most
0.3 % more of a whole model, and inferred from the figures. Those of VMamba come out with 10 for scan and observation in
each order in place of this 6, 0.5 % of the tiny variant.
"""

from collections import Counter
from collections.abc import Callable

from .depthwise_conv.flops import depthwise_conv
from .downsample.flops import downsample
from .fusion_taps.flops import fusion_taps
from .gated_norm.flops import gated_norm
from .layer_norm.flops import layer_norm
from .mlp.flops import mlp
from .scan_states.flops import scan_states
from .selective_scan.flops import selective_scan
from .ssm_layer.flops import ssm_layer
from .state_fusion.flops import state_fusion
from .structure_aware_ssm.flops import structure_aware_ssm

MULTIPLY_ADDS: dict[str, Callable[[list[tuple[int, ...]], tuple[int, ...]], Counter]] = {
    'depthwise_conv': depthwise_conv,
    'downsample': downsample,
    'fusion_taps': fusion_taps,
    'gated_norm': gated_norm,
    'layer_norm': layer_norm,
    'mlp': mlp,
    'scan_states': scan_states,
    'selective_scan': selective_scan,
    'ssm_layer': ssm_layer,
    'state_fusion': state_fusion,
    'structure_aware_ssm': structure_aware_ssm,
}
"""Counter of each op, by its name."""

PARTS = ('step_size', 'scan_states', 'state_fusion', 'observation')
"""Names under which the parts of the core are counted."""
