"""Makes the ops' costs (`mmspatialmamba.ops.flops`) known to MMEngine's complexity analysis.

MMEngine counts one operation per multiply-add, and nothing for an op that it does not know. With `register` its
`get_model_complexity_info` and the tools of the toolboxes count the ops of this package.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from mmengine.analysis import complexity_analysis

from .ops.flops import MULTIPLY_ADDS


def _handle(count: Callable) -> Callable[[list, list], Counter]:
    """Returns a counter that takes the traced op's inputs and outputs, ``torch._C.Value``, as MMEngine passes them."""

    def handle(inputs: list, outputs: list) -> Counter:
        return count([_shape(value) for value in inputs], _shape(outputs[0]))

    return handle


def _shape(value) -> tuple[int, ...]:
    """Returns the shape of a traced tensor; of anything else, ()."""
    kind = value.type()
    return tuple(kind.sizes() or ()) if isinstance(kind, torch._C.TensorType) else ()


HANDLES = {f'mmspatialmamba::{name}': _handle(count) for name, count in MULTIPLY_ADDS.items()}
"""Counter of each op by its traced name, for ``FlopAnalyzer.set_op_handle``."""


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
