"""Structure-aware state fusion: each state becomes a weighted sum of its neighbours on the image grid."""

import torch

from .checks import check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from .library import accumulation_dtype, define, refuse_double_backward, register_autograd

DILATIONS = (1, 3, 5)
RADIUS = max(DILATIONS)
TAP_OFFSETS = ((0, 0), *((d * y, d * x) for d in DILATIONS for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)))
"""Offsets (rows, columns) of the 25 distinct taps: the centre, then the eight neighbours of each dilation."""


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
    """
    op = 'fusion_taps'
    check_tensor(op, 'dwconv_d1', dwconv_d1, 4)
    E = dwconv_d1.shape[0]
    for name, kernel in (('dwconv_d1', dwconv_d1), ('dwconv_d3', dwconv_d3), ('dwconv_d5', dwconv_d5)):
        check_parameter(op, name, kernel, (E, 1, 3, 3), dwconv_d1)
    check_parameter(op, 'alpha', alpha, (3,), dwconv_d1)
    kernels = torch.stack((dwconv_d1, dwconv_d3, dwconv_d5)).view(3, E, 9) * alpha.view(3, 1, 1)
    centre = kernels[:, :, 4].sum(0, keepdim=True)
    neighbours = torch.cat((kernels[:, :, :4], kernels[:, :, 5:]), 2).transpose(1, 2).reshape(24, E)
    return torch.cat((centre, neighbours))


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


def state_fusion_reference(h: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Computes `state_fusion` with plain PyTorch: 25 shifted, weighted sums."""
    padded = _pad_replicate(h.to(taps.dtype))
    g = torch.zeros_like(h, dtype=taps.dtype, memory_format=torch.contiguous_format)
    for tap, offset in zip(taps, TAP_OFFSETS, strict=True):
        g.addcmul_(_shifted(padded, offset, h), tap)
    return g.to(h.dtype)


def state_fusion_backward_reference(
    dg: torch.Tensor, h: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `state_fusion` with plain PyTorch."""
    dg = dg.to(taps.dtype)
    padded = _pad_replicate(h.to(taps.dtype))
    dpadded = torch.zeros_like(padded)
    dtaps = torch.empty_like(taps)
    for k, offset in enumerate(TAP_OFFSETS):
        _shifted(dpadded, offset, h).addcmul_(dg, taps[k])
        dtaps[k] = (_shifted(padded, offset, h) * dg).sum((0, 1, 2))
    return _fold_replicate(dpadded).to(h.dtype), dtaps


def _pad_replicate(h: torch.Tensor) -> torch.Tensor:
    """Extends the grid by ``RADIUS`` on each side: an index outside is clamped to the border."""
    for dim in (1, 2):
        size = h.shape[dim]
        index = torch.arange(-RADIUS, size + RADIUS, device=h.device).clamp(0, size - 1)
        h = h.index_select(dim, index)
    return h


def _fold_replicate(dpadded: torch.Tensor) -> torch.Tensor:
    """Is the adjoint of `_pad_replicate`: adds what lies outside the grid to the border that it was read from."""
    for dim in (1, 2):
        size = dpadded.shape[dim] - 2 * RADIUS
        inside = dpadded.narrow(dim, RADIUS, size).clone()
        inside.narrow(dim, 0, 1).add_(dpadded.narrow(dim, 0, RADIUS).sum(dim, keepdim=True))
        inside.narrow(dim, size - 1, 1).add_(dpadded.narrow(dim, RADIUS + size, RADIUS).sum(dim, keepdim=True))
        dpadded = inside
    return dpadded


def _shifted(padded: torch.Tensor, offset: tuple[int, int], h: torch.Tensor) -> torch.Tensor:
    """Returns the view of the padded map that lies ``offset`` away from the grid of ``h``."""
    y, x = offset
    return padded.narrow(1, RADIUS + y, h.shape[1]).narrow(2, RADIUS + x, h.shape[2])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dg):
    return torch.ops.mmspatialmamba.state_fusion_backward(dg, *ctx.saved_tensors)


define(
    'state_fusion(Tensor h, Tensor taps) -> Tensor',
    state_fusion_reference,
    lambda h, taps: h.new_empty(h.shape),
)
define(
    'state_fusion_backward(Tensor dg, Tensor h, Tensor taps) -> (Tensor dh, Tensor dtaps)',
    state_fusion_backward_reference,
    lambda dg, h, taps: (h.new_empty(h.shape), taps.new_empty(taps.shape)),
)
register_autograd('state_fusion', _backward, _setup_context)
refuse_double_backward('state_fusion_backward')
