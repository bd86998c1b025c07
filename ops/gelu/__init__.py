"""The exact GELU as one op, in one pass each way on a CPU."""

import torch

from ..checks import check_tensor, refuse_forward_mode
from ..library import LIBRARY, REFERENCES, define, refuse_double_backward, register_autograd
from .reference import gelu_backward_reference, gelu_reference


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Computes ``x · Φ(x)``, with Φ the distribution function of the standard normal distribution.

    Args:
        x: Values of any shape; float32, float64, bfloat16 or float16.

    Returns:
        out, shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: x is no floating-point tensor.
        NotImplementedError: x carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``x``; the C++ kernel computes in float32
        (float64 for float64), with Φ to 8e-8 in float32, and rounds once. Backward keeps x. Two runs give the same
        bits. On a GPU it is PyTorch's own GELU, which `torch.compile` and export see as such. No double backward on a
        CPU.
    """
    op = 'gelu'
    check_tensor(op, 'x', x)
    refuse_forward_mode(op, x)
    return torch.ops.mmspatialmamba.gelu(x)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.mmspatialmamba.gelu_backward(dy, *ctx.saved_tensors)


define('gelu(Tensor x) -> Tensor', 'x: ...', gelu_reference, lambda x: x.new_empty(x.shape))
define(
    'gelu_backward(Tensor dy, Tensor x) -> Tensor',
    'dy: ..., x: ...',
    gelu_backward_reference,
    lambda dy, x: x.new_empty(x.shape),
)
register_autograd('gelu', _backward, _setup_context)
refuse_double_backward('gelu_backward')
LIBRARY.impl('gelu', REFERENCES['gelu'], 'AutogradCUDA')
