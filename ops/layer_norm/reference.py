"""LayerNorm and its gradients in plain PyTorch."""

import torch

from ..compat import VERSION


def layer_norm_reference(x, weight, bias, eps, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes `layer_norm` with plain PyTorch, and the statistics that backward needs.

    Returns:
        out in the given dtype, mean and inverse deviation (..., 1), float32 (float64 for float64).
    """
    out, mean, inverse = torch.native_layer_norm(_widen(x, weight, bias), x.shape[-1:], weight, bias, eps)
    return out.to(dtype).contiguous(), mean, inverse


def layer_norm_backward_reference(dout, x, mean, inverse, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `layer_norm` with plain PyTorch.

    Returns:
        dx, and those of weight and bias as the rows of one tensor (2, E), so that partial sums of both are added at
        once; 0 for one that is not there.
    """
    # On a CPU PyTorch's formula reads its tensors as if they were contiguous.
    wide, dout, mean, inverse = (tensor.to(mean.dtype).contiguous() for tensor in (x, dout, mean, inverse))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout, wide, x.shape[-1:], mean, inverse, weight, bias,
        [True, weight is not None, bias is not None],
    )  # fmt: skip
    zeros = mean.new_zeros(x.shape[-1])
    rows = [zeros if gradient is None else gradient for gradient in (dweight, dbias)]
    return dx.to(x.dtype).contiguous(), torch.stack(rows)


def _widen(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """Returns x as PyTorch's LayerNorm is to take it for statistics, and gradients of the parameters, in float32.

    A CPU's takes 16 bits beside parameters in float32, and has statistics in float32 then, but adds the gradients of
    the parameters in 16 bits. That of other devices takes one dtype, as a CPU's does of float16 in PyTorch 2.1.
    """
    takes_two = x.device.type == 'cpu' and (VERSION >= (2, 6) or x.dtype != torch.float16)
    mixed = takes_two and all(parameter is not None for parameter in parameters)
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters if mixed)
    return x if x.dtype == torch.float64 or (mixed and not trained) else x.float()
