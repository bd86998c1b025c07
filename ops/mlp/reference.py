"""The MLP branch and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F

from ..residual import add_branch, scale_gradient


def mlp_reference(
    x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, keep_hidden
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `mlp` of tokens (L, d), ``scale`` given for each (L,), with plain PyTorch.

    Returns the hidden values, without their bias, besides.
    """
    norm = F.layer_norm(x.to(norm_weight.dtype), x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = norm.to(weight1.dtype) @ weight1.T
    branch = F.linear(F.gelu(hidden + bias1).to(weight2.dtype), weight2, bias2)
    return add_branch(x, branch, scale), hidden if keep_hidden else hidden.new_empty((0, len(weight1)))


def mlp_backward_reference(
    dout, x, norm_weight, norm_bias, eps, weight1, bias1, weight2, scale, hidden
) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `mlp` with plain PyTorch, from x and the hidden values."""
    dtype, shape = weight1.dtype, x.shape[-1:]
    dbranch = scale_gradient(dout, scale).to(dtype)
    x_acc, before = x.to(norm_weight.dtype), hidden + bias1
    norm, mean, inverse_deviation = torch.ops.aten.native_layer_norm(x_acc, shape, norm_weight, norm_bias, eps)
    dbefore = torch.ops.aten.gelu_backward((dbranch @ weight2).to(bias1.dtype), before)
    dweight2 = dbranch.T @ F.gelu(before).to(dtype)
    dbias1, dbefore = dbefore.sum(0), dbefore.to(dtype)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        (dbefore @ weight1).to(x_acc.dtype), x_acc, shape, mean, inverse_deviation, norm_weight, norm_bias, [True] * 3
    )
    return (
        (dx + dout).to(x.dtype), dnorm_weight, dnorm_bias, dbefore.T @ norm.to(dtype), dbias1, dweight2,
        dbranch.sum(0, dtype=bias1.dtype).to(dtype),
    )  # fmt: skip
