"""The MLP branch and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

from ..residual import add_branch, scale_gradient

OPS = torch.ops.mmspatialmamba


def mlp_reference(
    x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, keep
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes `mlp` of tokens (L, d), ``scale`` given for each (L,), with plain PyTorch.

    Returns besides, if it is to be kept, what backward reads: what PyTorch's layers keep, since to compute any of it
    again by PyTorch's functions would move more bytes than the layers do.
    """
    norm, mean, inverse = OPS.layer_norm(x, norm_weight, norm_bias, eps, weight1.dtype)
    hidden = F.linear(norm, weight1, bias1)
    activated = F.gelu(hidden)
    out = add_branch(x, F.linear(activated, weight2, bias2), scale)
    return out, [norm, mean, inverse, hidden, activated] if keep else []


def mlp_backward_reference(
    dout, x, norm_weight, norm_bias, eps, weight1, weight2, scale, kept, parameters
) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `mlp` with plain PyTorch from what forward kept; without ``parameters`` that of x."""
    norm, mean, inverse, hidden, activated = kept
    dbranch = scale_gradient(dout, scale).to(weight1.dtype)
    dhidden = torch.ops.aten.gelu_backward(dbranch @ weight2, hidden)
    dx, dnorm = OPS.layer_norm_backward(dhidden @ weight1, x, mean, inverse, norm_weight, norm_bias)
    dx.add_(dout)
    if not parameters:
        return dx, *(x.new_empty(0) for _ in range(6))
    return (
        dx, *(gradient.clone() for gradient in dnorm), dhidden.T @ norm, dhidden.sum(0), dbranch.T @ activated,
        dbranch.sum(0),
    )  # fmt: skip
