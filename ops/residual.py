"""The skip connection of a branch with drop path."""

import torch


def add_branch(
    x: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``x + scale · branch`` in one pass.

    Args:
        x: Maps (N, H, W, d) or tokens (L, d).
        branch: Shape of ``x``.
        scale: Factor of each map or token, (N,) or (L,); None for 1.
        out: Where to write the sum; None for a new tensor.
    """
    return torch.add(x, branch, out=out) if scale is None else torch.addcmul(x, branch, _spread(scale, x), out=out)


def scale_gradient(dout: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Returns the gradient of the branch from that of `add_branch`."""
    return dout if scale is None else dout * _spread(scale, dout)


def _spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (x.ndim - 1))
