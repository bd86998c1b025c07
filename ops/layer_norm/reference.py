"""LayerNorm and its gradients in plain PyTorch."""

import torch


def layer_norm_reference(x, weight, bias, eps, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes `layer_norm` with plain PyTorch, and the statistics that backward needs.

    Returns:
        out in the given dtype, mean and inverse deviation (..., 1), float32 (float64 for float64).
    """
    out, mean, inverse = torch.native_layer_norm(_widen(x), x.shape[-1:], weight, bias, eps)
    return out.to(dtype).contiguous(), mean, inverse


def layer_norm_backward_reference(dout, x, mean, inverse, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `layer_norm` with plain PyTorch.

    Returns:
        dx, and those of weight and bias as the rows of one tensor (2, E), so that partial sums of both are added at
        once; 0 for one that is not there.
    """
    wide = _widen(x)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(wide.dtype), wide, x.shape[-1:], mean, inverse, weight, bias,
        [True, weight is not None, bias is not None],
    )  # fmt: skip
    zeros = mean.new_zeros(x.shape[-1])
    rows = [zeros if gradient is None else gradient for gradient in (dweight, dbias)]
    return dx.to(x.dtype).contiguous(), torch.stack(rows)


def _widen(x: torch.Tensor) -> torch.Tensor:
    """Returns x in the dtype of the parameters: PyTorch would add their gradients in 16 bits on a CPU."""
    return x if x.dtype == torch.float64 else x.float()
