"""The gated norm and its gradients in plain PyTorch."""

import torch
import torch.nn.functional as F


def gated_norm_reference(y, z, weight, bias, eps) -> torch.Tensor:
    """Computes `gated_norm` with plain PyTorch."""
    y_acc, z_acc = (x.to(weight.dtype) for x in (y, z))
    return (F.layer_norm(y_acc, y.shape[-1:], weight, bias, eps) * F.silu(z_acc)).to(y.dtype).contiguous()


def gated_norm_backward_reference(dout, y, z, weight, bias, eps, with_out=False) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `gated_norm` with plain PyTorch, from the inputs alone, and its output if asked for.

    Returns:
        dy, dz, those of weight and bias as the rows of one tensor (2, E), so that partial sums of both are added at
        once, and the output, or an empty tensor.
    """
    dout, y_acc, z_acc = (x.to(weight.dtype) for x in (dout, y, z))
    shape = y.shape[-1:]
    norm, mean, inverse_deviation = torch.ops.aten.native_layer_norm(y_acc, shape, weight, bias, eps)
    gate = F.silu(z_acc)
    dz = torch.ops.aten.silu_backward(dout * norm, z_acc)
    dy, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout * gate, y_acc, shape, mean, inverse_deviation, weight, bias, [True, True, True]
    )
    out = norm * gate if with_out else norm.new_empty(0)
    dy, dz, out = (x.to(y.dtype).contiguous() for x in (dy, dz, out))
    return dy, dz, torch.stack((dweight, dbias)), out
