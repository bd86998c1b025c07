"""What the ops cost, for PyTorch's own counter, `torch.utils.flop_counter.FlopCounterMode`.

It counts two operations for a multiply-add of products and convolutions and none for a norm; so does this, from the
multiply-adds of `flops`. A backward op counts twice its forward op, as that of a convolution does; what it computes
again is left out.
"""

from collections.abc import Callable

import torch
from torch.utils import flop_counter

from .flops import MULTIPLY_ADDS


def register() -> None:
    """Makes the ops known to the counter, on a PyTorch whose counter can be told of ops; that of 2.1 cannot."""
    register_formula = getattr(flop_counter, 'register_flop_formula', None)
    if register_formula is None:
        return
    ops = torch.ops.mmspatialmamba
    for name, count in MULTIPLY_ADDS.items():
        register_formula(getattr(ops, name))(_forward(count))
        register_formula(getattr(ops, f'{name}_backward'))(_backward(count))


def _forward(count: Callable) -> Callable[..., int]:
    def formula(*shapes, out_shape, **_) -> int:
        # A list or tuple of shapes where the op returns more than one tensor.
        output = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return _operations(count, shapes, output)

    return formula


def _backward(count: Callable) -> Callable[..., int]:
    def formula(dout, *shapes, **_) -> int:
        return 2 * _operations(count, shapes, dout)

    return formula


def _operations(count: Callable, shapes: tuple, output: torch.Size) -> int:
    parts = count(list(shapes), output)
    return 2 * (parts.total() - parts['layer_norm'])
