"""The state fusion and its gradients in plain PyTorch."""

import torch

from .taps import RADIUS, TAP_OFFSETS


def state_fusion_reference(h: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Computes `state_fusion` with plain PyTorch: 25 shifted, weighted sums."""
    padded = _pad_replicate(h.to(taps.dtype))
    g = torch.zeros_like(h, dtype=taps.dtype, memory_format=torch.contiguous_format)
    for tap, offset in zip(taps, TAP_OFFSETS):
        g.addcmul_(_shifted(padded, offset, h), tap)
    return g.to(h.dtype)


def state_fusion_backward_reference(
    dg: torch.Tensor, h: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `state_fusion` with plain PyTorch."""
    dg = dg.to(taps.dtype)
    padded = _pad_replicate(h.to(taps.dtype))
    dpadded = torch.zeros_like(padded)
    dtaps = torch.empty_like(taps)
    for k, offset in enumerate(TAP_OFFSETS):
        _shifted(dpadded, offset, h).addcmul_(dg, taps[k])
        dtaps[k] = (_shifted(padded, offset, h) * dg).sum((0, 1, 2))
    return _fold_replicate(dpadded).to(h.dtype), dtaps


def _pad_replicate(h: torch.Tensor) -> torch.Tensor:
    """Extends the grid by ``RADIUS`` on each side: an index outside is clamped to the border."""
    for dim in (1, 2):
        size = h.shape[dim]
        index = torch.arange(-RADIUS, size + RADIUS, device=h.device).clamp(0, size - 1)
        h = h.index_select(dim, index)
    return h


def _fold_replicate(dpadded: torch.Tensor) -> torch.Tensor:
    """Is the adjoint of `_pad_replicate`: adds what lies outside the grid to the border that it was read from."""
    for dim in (1, 2):
        size = dpadded.shape[dim] - 2 * RADIUS
        inside = dpadded.narrow(dim, RADIUS, size).clone()
        inside.narrow(dim, 0, 1).add_(dpadded.narrow(dim, 0, RADIUS).sum(dim, keepdim=True))
        inside.narrow(dim, size - 1, 1).add_(dpadded.narrow(dim, RADIUS + size, RADIUS).sum(dim, keepdim=True))
        dpadded = inside
    return dpadded


def _shifted(padded: torch.Tensor, offset: tuple[int, int], h: torch.Tensor) -> torch.Tensor:
    """Returns the view of the padded map that lies ``offset`` away from the grid of ``h``."""
    y, x = offset
    return padded.narrow(1, RADIUS + y, h.shape[1]).narrow(2, RADIUS + x, h.shape[2])
