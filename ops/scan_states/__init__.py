"""The selective scan with state size 1: a linear recurrence for each channel, over the tokens in order."""

import torch

from ..checks import check_like, check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from .reference import scan_states_backward_reference, scan_states_reference


def scan_states(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Computes the state ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` with ``h_0 = 0``.

    Args:
        u: Input, (N, L, E), channels last; float32, float64, bfloat16 or float16.
        delta: Step size Δ > 0, (N, L, E), dtype of ``u``.
        A: Decay rate of each channel, (E,), negative.
        B: Input weight of each token, shared by all channels, (N, L, 1), dtype of ``u``.

    Returns:
        The state h, (N, L, E), contiguous, dtype of ``u``.

    Raises:
        TypeError: An argument is no floating-point tensor, or has another dtype than ``u``.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``u``; the state accumulates in float32
        (float64 for float64), and A is converted to that dtype. Backward keeps the inputs only and computes the state
        again. Two runs give the same bits, forward and backward. No double backward.

        Source: arXiv 2410.15091, equation of the state transition, discretised by zero-order hold for A and by Euler
        for B as in Mamba (arXiv 2312.00752).
    """
    op = 'scan_states'
    check_tensor(op, 'u', u, 3)
    check_not_empty(op, 'u', u)
    N, L, E = u.shape
    check_like(op, 'delta', delta, (N, L, E), u)
    check_parameter(op, 'A', A, (E,), u)
    check_like(op, 'B', B, (N, L, 1), u)
    refuse_forward_mode(op, u, delta, A, B)
    return torch.ops.mmspatialmamba.scan_states(u, delta, A.to(accumulation_dtype(u.dtype)), B)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dh):
    return torch.ops.mmspatialmamba.scan_states_backward(dh, *ctx.saved_tensors)


_SHAPES = 'u: N L E, delta: N L E, A: E, B: N L 1'

define(
    'scan_states(Tensor u, Tensor delta, Tensor A, Tensor B) -> Tensor',
    _SHAPES,
    scan_states_reference,
    lambda u, delta, A, B: u.new_empty(u.shape),
)
define(
    'scan_states_backward(Tensor dh, Tensor u, Tensor delta, Tensor A, Tensor B)'
    ' -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB)',
    f'dh: N L E, {_SHAPES}',
    scan_states_backward_reference,
    lambda dh, *inputs: tuple(x.new_empty(x.shape) for x in inputs),
)
register_autograd('scan_states', _backward, _setup_context)
refuse_double_backward('scan_states_backward')
