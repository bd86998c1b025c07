"""The 25 taps of the state fusion: where they are, and how the three dilated kernels become them."""

import torch

from ..checks import check_parameter, check_tensor

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
