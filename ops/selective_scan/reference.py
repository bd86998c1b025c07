"""The selective scan in several orders and its gradients in plain PyTorch, one order after the other."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..scan_states.reference import scan_states_backward_reference, scan_states_reference, softplus
from .orders import check_orders, split, visited

OP = 'selective_scan'


def selective_scan_reference(u, dt, B, C, dt_weight, dt_bias, A, D, orders) -> torch.Tensor:
    """Computes `selective_scan` with plain PyTorch."""
    _check(u, A, orders)
    u_acc = u.to(A.dtype).contiguous().flatten(1, 2)
    y = u_acc * D.sum(0)
    for k, at in _visits(u, orders):
        u_k, dt_k, B_k, C_k = u_acc[:, at], *(_sequence(x, k, at, A.dtype) for x in (dt, B, C))
        delta = softplus(F.linear(dt_k, dt_weight[k], dt_bias[k]))
        for s in range(A.shape[-1]):
            y[:, at] += C_k[..., s, None] * scan_states_reference(u_k, delta, A[k, :, s], B_k[..., s, None])
    return y.view(u.shape).to(u.dtype)


def selective_scan_backward_reference(
    dy, u, dt, B, C, dt_weight, dt_bias, A, D, orders: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `selective_scan` with plain PyTorch, from the inputs alone."""
    _check(u, A, orders)
    acc = A.dtype
    u_acc, dy = (x.to(acc).contiguous().flatten(1, 2) for x in (u, dy))
    du = dy * D.sum(0)
    dD = (dy * u_acc).sum((0, 1)).expand(D.shape).clone()
    ddt, dB, dC = (x.new_zeros(x.shape, dtype=acc) for x in (dt, B, C))
    ddt_weight, ddt_bias, dA = (x.new_zeros(x.shape) for x in (dt_weight, dt_bias, A))
    for k, at in _visits(u, orders):
        u_k, dy_k, dt_k, B_k, C_k = u_acc[:, at], dy[:, at], *(_sequence(x, k, at, acc) for x in (dt, B, C))
        pre = F.linear(dt_k, dt_weight[k], dt_bias[k])
        delta = softplus(pre)
        ddelta = torch.zeros_like(delta)
        for s in range(A.shape[-1]):
            scan = u_k, delta, A[k, :, s], B_k[..., s, None]
            _at(dC, k)[:, at, s] = (dy_k * scan_states_reference(*scan)).sum(-1)
            du_s, ddelta_s, dA[k, :, s], dB_s = scan_states_backward_reference(dy_k * C_k[..., s, None], *scan)
            du[:, at] += du_s
            ddelta += ddelta_s
            _at(dB, k)[:, at, s] = dB_s[..., 0]
        dpre = ddelta * torch.sigmoid(pre)
        _at(ddt, k)[:, at] = dpre @ dt_weight[k]
        ddt_weight[k] = dpre.flatten(0, 1).T @ dt_k.flatten(0, 1)
        ddt_bias[k] = dpre.sum((0, 1))
    return *(x.to(u.dtype) for x in (du.view(u.shape), ddt, dB, dC)), ddt_weight, ddt_bias, dA, dD


def _check(u: torch.Tensor, A: torch.Tensor, orders: Sequence[int]) -> None:
    check_orders(OP, orders, len(A), u.shape[1] * u.shape[2])


def _visits(u: torch.Tensor, orders: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the number of each order and the addresses of its positions, in their sequence."""
    for k, order in enumerate(split(orders)):
        yield k, visited(order, u.shape[1] * u.shape[2], u.device)


def _sequence(x: torch.Tensor, k: int, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns order k of a map (N, H, W, K, ·) in its sequence, (N, L, ·)."""
    return x[:, :, :, k].flatten(1, 2)[:, at].to(dtype)


def _at(x: torch.Tensor, k: int) -> torch.Tensor:
    """Returns order k of a contiguous map (N, H, W, K, ·) as a view, (N, L, ·)."""
    return x.flatten(1, 2)[:, :, k]
