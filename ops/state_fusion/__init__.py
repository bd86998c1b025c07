"""Structure-aware state fusion: each state becomes a weighted sum of its neighbours on the image grid."""

import torch

from ..checks import check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from .reference import state_fusion_backward_reference, state_fusion_reference
from .taps import TAP_OFFSETS


def state_fusion(h: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Computes ``g = sum_k taps_k * h[at offset k]`` on the grid, for each channel, with replicate padding.

    An offset that leaves the grid reads the nearest border state. With `fusion_taps` this is the sum of three
    depthwise 3x3 convolutions of dilation 1, 3 and 5, each times its alpha.

    Args:
        h: States, (N, H, W, E), channels last; float32, float64, bfloat16 or float16.
        taps: Weights, (25, E), in the order of ``TAP_OFFSETS``.

    Returns:
        Fused states g, (N, H, W, E), contiguous, dtype of ``h``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``h``; sums accumulate in float32 (float64 for
        float64), and the taps are converted to that dtype. Backward keeps the inputs. Two runs give the same bits,
        forward and backward. No double backward.

        Source: arXiv 2410.15091, structure-aware state fusion.
    """
    op = 'state_fusion'
    check_tensor(op, 'h', h, 4)
    check_not_empty(op, 'h', h)
    check_parameter(op, 'taps', taps, (len(TAP_OFFSETS), h.shape[-1]), h)
    refuse_forward_mode(op, h, taps)
    return torch.ops.mmspatialmamba.state_fusion(h, taps.to(accumulation_dtype(h.dtype)))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dg):
    return torch.ops.mmspatialmamba.state_fusion_backward(dg, *ctx.saved_tensors)


_SHAPES = f'h: N H W E, taps: {len(TAP_OFFSETS)} E'

define(
    'state_fusion(Tensor h, Tensor taps) -> Tensor',
    _SHAPES,
    state_fusion_reference,
    lambda h, taps: h.new_empty(h.shape),
)
define(
    'state_fusion_backward(Tensor dg, Tensor h, Tensor taps) -> (Tensor dh, Tensor dtaps)',
    f'dg: N H W E, {_SHAPES}',
    state_fusion_backward_reference,
    lambda dg, h, taps: (h.new_empty(h.shape), taps.new_empty(taps.shape)),
)
register_autograd('state_fusion', _backward, _setup_context)
refuse_double_backward('state_fusion_backward')

__all__ = ['TAP_OFFSETS', 'state_fusion']
