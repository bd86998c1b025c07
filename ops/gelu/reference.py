"""GELU and its gradient in plain PyTorch."""

import torch
import torch.nn.functional as F


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """Computes `gelu` with PyTorch's own."""
    return F.gelu(x.contiguous())


def gelu_backward_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Computes the gradient of `gelu` with PyTorch's own."""
    return torch.ops.aten.gelu_backward(dy.contiguous(), x.contiguous())
