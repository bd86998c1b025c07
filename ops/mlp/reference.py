"""The MLP branch and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

from ..residual import add_branch, scale_gradient


def mlp_reference(
    x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, keep
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes `mlp` of tokens (L, d), ``scale`` given for each (L,), with plain PyTorch.

    Returns besides, if it is to be kept, what backward reads: what PyTorch's layers keep, since to compute any of it
    again by PyTorch's functions would move more bytes than the layers do.
    """
    weight, bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    norm, mean, inverse_deviation = torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    norm = norm.to(weight1.dtype)
    hidden = F.linear(norm, weight1, bias1)
    activated = F.gelu(hidden)
    out = add_branch(x, F.linear(activated, weight2, bias2), scale)
    return out, [norm, mean, inverse_deviation, hidden, activated] if keep else []


def mlp_backward_reference(
    dout, x, norm_weight, norm_bias, eps, weight1, weight2, scale, kept, parameters
) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `mlp` with plain PyTorch from what forward kept; without ``parameters`` that of x."""
    norm, mean, inverse_deviation, hidden, activated = kept
    dbranch = scale_gradient(dout, scale).to(weight1.dtype)
    dhidden = torch.ops.aten.gelu_backward(dbranch @ weight2, hidden)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        (dhidden @ weight1).to(x.dtype), x, x.shape[-1:], mean, inverse_deviation, norm_weight.to(x.dtype),
        norm_bias.to(x.dtype), [True, parameters, parameters],
    )  # fmt: skip
    dx = dx.add_(dout)
    if not parameters:
        return dx, *(x.new_empty(0) for _ in range(6))
    return (
        dx, dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype), dhidden.T @ norm, dhidden.sum(0),
        dbranch.T @ activated, dbranch.sum(0),
    )  # fmt: skip
