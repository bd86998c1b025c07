"""The selective scan with state size 1: a linear recurrence for each channel, over the tokens in order."""

import math

import torch
import torch.nn.functional as F

from .checks import check_like, check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from .library import accumulation_dtype, define, refuse_double_backward, register_autograd


def selective_scan(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
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
    op = 'selective_scan'
    check_tensor(op, 'u', u, 3)
    check_not_empty(op, 'u', u)
    N, L, E = u.shape
    check_like(op, 'delta', delta, (N, L, E), u)
    check_parameter(op, 'A', A, (E,), u)
    check_like(op, 'B', B, (N, L, 1), u)
    refuse_forward_mode(op, u, delta, A, B)
    return torch.ops.mmspatialmamba.selective_scan(u, delta, A.to(accumulation_dtype(u.dtype)), B)


def linear_recurrence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Computes ``h_t = a_t h_{t-1} + b_t`` along dimension 1, ``h_0 = 0``, in chunks of about sqrt(L/2) tokens.

    All chunks advance together: once to find what each contributes at its end, then, after the carries are combined
    in order, again from the right start. About 3 sqrt(L) steps stand for the L of the plain loop.

    Args:
        a: Factors, (N, L, E).
        b: Summands, (N, L, E).

    Returns:
        h, (N, L, E), contiguous.
    """
    N, L, E = b.shape
    length = max(1, math.isqrt(L // 2))
    chunks = -(-L // length)
    pad = (0, 0, 0, chunks * length - L)
    a = F.pad(a, pad).view(N, chunks, length, E)
    b = F.pad(b, pad).view(N, chunks, length, E)

    product, end = a[:, :, 0], b[:, :, 0]
    for t in range(1, length):
        product = product * a[:, :, t]
        end = torch.addcmul(b[:, :, t], a[:, :, t], end)

    state = b.new_zeros(N, E)
    start = torch.empty_like(end)
    for chunk in range(chunks):
        start[:, chunk] = state
        state = torch.addcmul(end[:, chunk], product[:, chunk], state)

    h = torch.empty_like(b)
    state = start
    for t in range(length):
        state = torch.addcmul(b[:, :, t], a[:, :, t], state)
        h[:, :, t] = state
    return h.view(N, chunks * length, E)[:, :L].contiguous()


def selective_scan_reference(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Computes `selective_scan` with plain PyTorch."""
    u_acc, delta_acc, B_acc = (x.to(A.dtype) for x in (u, delta, B))
    h = linear_recurrence(torch.exp(delta_acc * A), delta_acc * B_acc * u_acc)
    return h.to(u.dtype)


def selective_scan_backward_reference(
    dh: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of `selective_scan` with plain PyTorch.

    The adjoint state runs backwards: ``lambda_t = dh_t + a_{t+1} lambda_{t+1}``.
    """
    acc = A.dtype
    dh, u_acc, delta_acc, B_acc = (x.to(acc) for x in (dh, u, delta, B))
    a = torch.exp(delta_acc * A)
    h = linear_recurrence(a, delta_acc * B_acc * u_acc)
    adjoint = linear_recurrence(_shift(a, -1).flip(1), dh.flip(1)).flip(1)

    dA_per_delta = adjoint * a * _shift(h, 1)
    dinput = adjoint * delta_acc
    ddelta = dA_per_delta * A + adjoint * B_acc * u_acc
    dA = (dA_per_delta * delta_acc).sum((0, 1))
    dB = (dinput * u_acc).sum(-1, keepdim=True)
    return (dinput * B_acc).to(u.dtype), ddelta.to(u.dtype), dA, dB.to(u.dtype)


def _shift(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Moves ``x`` by one token forward (1) or backward (-1) along dimension 1, and puts 0 at the open end."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) if steps == 1 else F.pad(x[:, 1:], (0, 0, 0, 1))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dh):
    return torch.ops.mmspatialmamba.selective_scan_backward(dh, *ctx.saved_tensors)


define(
    'selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B) -> Tensor',
    selective_scan_reference,
    lambda u, delta, A, B: u.new_empty(u.shape),
)
define(
    'selective_scan_backward(Tensor dh, Tensor u, Tensor delta, Tensor A, Tensor B)'
    ' -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB)',
    selective_scan_backward_reference,
    lambda dh, *inputs: tuple(x.new_empty(x.shape) for x in inputs),
)
register_autograd('selective_scan', _backward, _setup_context)
refuse_double_backward('selective_scan_backward')
