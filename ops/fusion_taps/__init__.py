"""The 25 taps of the state fusion, from the three dilated kernels that they stand for."""

import torch

from ..checks import check_parameter, check_tensor, refuse_forward_mode
from ..library import LIBRARY, REFERENCES, define, refuse_double_backward, register_autograd
from ..state_fusion.taps import TAP_OFFSETS
from .reference import fusion_taps_backward_reference, fusion_taps_reference


def fusion_taps(
    dwconv_d1: torch.Tensor, dwconv_d3: torch.Tensor, dwconv_d5: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Merges the three dilated kernels and their scales into the 25 taps of `state_fusion`, differentiably.

    The kernels meet in the centre, so 27 values become 25. Call it in every forward pass: merged taps that outlive a
    change of the weights would be stale.

    Args:
        dwconv_d1: Depthwise kernel of dilation 1, (E, 1, 3, 3).
        dwconv_d3: Depthwise kernel of dilation 3, (E, 1, 3, 3).
        dwconv_d5: Depthwise kernel of dilation 5, (E, 1, 3, 3).
        alpha: One scale for each dilation, shared by all channels, (3,).

    Returns:
        Taps, (25, E), in the order of ``TAP_OFFSETS``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.
    """
    op = 'fusion_taps'
    check_tensor(op, 'dwconv_d1', dwconv_d1, 4)
    E = dwconv_d1.shape[0]
    for name, kernel in (('dwconv_d1', dwconv_d1), ('dwconv_d3', dwconv_d3), ('dwconv_d5', dwconv_d5)):
        check_parameter(op, name, kernel, (E, 1, 3, 3), dwconv_d1)
    check_parameter(op, 'alpha', alpha, (3,), dwconv_d1)
    refuse_forward_mode(op, dwconv_d1, dwconv_d3, dwconv_d5, alpha)
    dtype = dwconv_d1.dtype
    return torch.ops.mmspatialmamba.fusion_taps(dwconv_d1, dwconv_d3.to(dtype), dwconv_d5.to(dtype), alpha.to(dtype))


def _backward(ctx, dtaps):
    return torch.ops.mmspatialmamba.fusion_taps_backward(dtaps, *ctx.saved_tensors)


_SHAPES = 'dwconv_d1: E 1 3 3, dwconv_d3: E 1 3 3, dwconv_d5: E 1 3 3, alpha: 3'

define(
    'fusion_taps(Tensor dwconv_d1, Tensor dwconv_d3, Tensor dwconv_d5, Tensor alpha) -> Tensor',
    _SHAPES,
    fusion_taps_reference,
    lambda dwconv_d1, *others: dwconv_d1.new_empty(len(TAP_OFFSETS), len(dwconv_d1)),
)
define(
    'fusion_taps_backward(Tensor dtaps, Tensor dwconv_d1, Tensor dwconv_d3, Tensor dwconv_d5, Tensor alpha)'
    ' -> (Tensor ddwconv_d1, Tensor ddwconv_d3, Tensor ddwconv_d5, Tensor dalpha)',
    f'dtaps: {len(TAP_OFFSETS)} E, {_SHAPES}',
    fusion_taps_backward_reference,
    lambda dtaps, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs),
)
register_autograd('fusion_taps', _backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
refuse_double_backward('fusion_taps_backward')
# A GPU is kept waiting by a dozen launches for 25 values per channel; a CPU is not, and its autograd needs no formula.
LIBRARY.impl('fusion_taps', REFERENCES['fusion_taps'], 'AutogradCPU')
