"""The scan with state size 1 and its gradients in plain PyTorch."""

import math

import torch
import torch.nn.functional as F


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Computes log(1 + exp(x)), whose error in float64 is below 1e-21 (PyTorch's default threshold leaves 2e-9)."""
    return F.softplus(x, threshold=50.0)


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


def scan_states_reference(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Computes `scan_states` with plain PyTorch."""
    u_acc, delta_acc, B_acc = (x.to(A.dtype) for x in (u, delta, B))
    h = linear_recurrence(torch.exp(delta_acc * A), delta_acc * B_acc * u_acc)
    return h.to(u.dtype)


def scan_states_backward_reference(
    dh: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of `scan_states` with plain PyTorch.

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
