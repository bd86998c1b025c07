"""The fused core and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

from ..scan_states.reference import scan_states_backward_reference, scan_states_reference, softplus
from ..state_fusion.reference import state_fusion_backward_reference, state_fusion_reference


def structure_aware_ssm_reference(u, dt, B, C, dt_weight, dt_bias, A, D, taps) -> torch.Tensor:
    """Computes `structure_aware_ssm` with plain PyTorch."""
    u_acc, dt, B, C = (x.to(A.dtype) for x in (u, dt, B, C))
    delta = softplus(F.linear(dt, dt_weight, dt_bias))
    h = _on_sequence(scan_states_reference, u_acc, delta, A, B)
    g = state_fusion_reference(h, taps)
    return torch.addcmul(g * C, u_acc, D).to(u.dtype)


def structure_aware_ssm_backward_reference(dy, u, dt, B, C, dt_weight, dt_bias, A, D, taps) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `structure_aware_ssm` with plain PyTorch, from the inputs alone."""
    acc = A.dtype
    dy, u_acc, dt_acc, B_acc, C_acc = (x.to(acc) for x in (dy, u, dt, B, C))
    pre = F.linear(dt_acc, dt_weight, dt_bias)
    delta = softplus(pre)
    h = _on_sequence(scan_states_reference, u_acc, delta, A, B_acc)

    dC = (dy * state_fusion_reference(h, taps)).sum(-1, keepdim=True)
    dD = (dy * u_acc).sum((0, 1, 2))
    dh, dtaps = state_fusion_backward_reference(dy * C_acc, h, taps)
    du, ddelta, dA, dB = _on_sequence(scan_states_backward_reference, dh, u_acc, delta, A, B_acc)
    du = torch.addcmul(du, dy, D)

    dpre = ddelta * torch.sigmoid(pre)
    ddt = dpre @ dt_weight
    ddt_weight = dpre.flatten(0, 2).T @ dt_acc.flatten(0, 2)
    ddt_bias = dpre.sum((0, 1, 2))
    gradients = (du, ddt, dB, dC)
    return *(x.to(u.dtype) for x in gradients), ddt_weight, ddt_bias, dA, dD, dtaps


def _on_sequence(scan, *args: torch.Tensor):
    """Calls ``scan`` with the grids (N, H, W, ·) as sequences (N, HW, ·), and gives its outputs the grids back."""
    grid = args[0].shape[1:3]
    outputs = scan(*(x.flatten(1, 2) if x.ndim == 4 else x for x in args))
    if isinstance(outputs, torch.Tensor):
        return outputs.unflatten(1, grid)
    return tuple(x.unflatten(1, grid) if x.ndim == 3 else x for x in outputs)
