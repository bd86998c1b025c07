"""Triton kernels that merge the three dilated kernels into the 25 taps, one launch each way.

What they move is little: forward 52 values per channel, backward 79. In PyTorch's functions that is 6 launches forward
and 8 backward in each block, which a CPU takes longer to enqueue than a GPU to fuse the states.

All arithmetic is float32. In backward a program takes all channels of a dilation: their sum needs no
second launch.
"""

import torch
import triton
import triton.language as tl

from ..state_fusion.taps import DILATIONS, TAP_OFFSETS
from ..triton_backend import ceil_div, launch, register
from .reference import fusion_taps_backward_reference, fusion_taps_reference

BLOCK_E = 256
"""Channels that are computed at a time."""
NUM_WARPS = 8

COUNT = tl.constexpr(len(DILATIONS))
KERNEL = tl.constexpr(9)
CENTRE = tl.constexpr(4)
"""Of a kernel, in the order of memory: this tap is shared by all dilations, each of the others has a row of its own."""


@triton.jit
def _load_tap(kernels, e, E, j: tl.constexpr, k: tl.constexpr):
    """Loads tap k of dilation j of channels e as float32."""
    return tl.load(kernels[j] + e * KERNEL + k, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def taps_kernel(d1_ptr, d3_ptr, d5_ptr, alpha_ptr, taps_ptr, E, BLOCK_E: tl.constexpr):
    """Merges the kernels of some channels.

    Grid: channel blocks. Reads the kernels (E, 9) of its channels and alpha, (3,); writes taps, (25, E).
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    kernels = (d1_ptr, d3_ptr, d5_ptr)
    centre = tl.zeros((BLOCK_E,), tl.float32)
    for j in tl.static_range(COUNT):
        alpha = tl.load(alpha_ptr + j).to(tl.float32)
        for k in tl.static_range(KERNEL):
            tap = alpha * _load_tap(kernels, e, E, j, k)
            if k == CENTRE:
                centre += tap
            else:
                row = 1 + j * (KERNEL - 1) + (k if k < CENTRE else k - 1)
                tl.store(taps_ptr + row * E + e, tap.to(taps_ptr.dtype.element_ty), mask=e < E)
    tl.store(taps_ptr + e, centre.to(taps_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def taps_backward_kernel(
    dtaps_ptr, d1_ptr, d3_ptr, d5_ptr, alpha_ptr, dd1_ptr, dd3_ptr, dd5_ptr, dalpha_ptr, E, BLOCK_E: tl.constexpr
):
    """Computes the gradients of kernels and alpha.

    Grid: dilations. Reads dtaps, (25, E), kernels and alpha; writes their gradients.
    """
    kernels = (d1_ptr, d3_ptr, d5_ptr)
    gradients = (dd1_ptr, dd3_ptr, dd5_ptr)
    for j in tl.static_range(COUNT):
        if tl.program_id(0) == j:
            alpha = tl.load(alpha_ptr + j).to(tl.float32)
            dalpha = tl.zeros((BLOCK_E,), tl.float32)
            for begin in range(0, E, BLOCK_E):
                e = begin + tl.arange(0, BLOCK_E)
                for k in tl.static_range(KERNEL):
                    row = 0 if k == CENTRE else 1 + j * (KERNEL - 1) + (k if k < CENTRE else k - 1)
                    dtap = tl.load(dtaps_ptr + row * E + e, mask=e < E, other=0.0).to(tl.float32)
                    dalpha += dtap * _load_tap(kernels, e, E, j, k)
                    gradient = (alpha * dtap).to(dd1_ptr.dtype.element_ty)
                    tl.store(gradients[j] + e * KERNEL + k, gradient, mask=e < E)
            tl.store(dalpha_ptr + j, tl.sum(dalpha, 0).to(dalpha_ptr.dtype.element_ty))


def fusion_taps(dwconv_d1, dwconv_d3, dwconv_d5, alpha) -> torch.Tensor:
    """Computes the op `fusion_taps`."""
    E = len(dwconv_d1)
    taps = torch.empty(len(TAP_OFFSETS), E, dtype=dwconv_d1.dtype, device=dwconv_d1.device)
    arguments = (x.contiguous() for x in (dwconv_d1, dwconv_d3, dwconv_d5, alpha))
    launch(taps_kernel, ceil_div(E, BLOCK_E), *arguments, taps, E, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS)
    return taps


def fusion_taps_backward(dtaps, dwconv_d1, dwconv_d3, dwconv_d5, alpha) -> tuple[torch.Tensor, ...]:
    """Computes the op `fusion_taps_backward`."""
    inputs = [x.contiguous() for x in (dwconv_d1, dwconv_d3, dwconv_d5, alpha)]
    gradients = [torch.empty_like(x) for x in inputs]
    launch(
        taps_backward_kernel, len(DILATIONS), dtaps.contiguous(), *inputs, *gradients, len(dwconv_d1),
        BLOCK_E=BLOCK_E, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return tuple(gradients)


register('fusion_taps', fusion_taps, fusion_taps_reference)
register('fusion_taps_backward', fusion_taps_backward, fusion_taps_backward_reference)
