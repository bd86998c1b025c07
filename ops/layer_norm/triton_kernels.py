"""Triton kernels of LayerNorm, forward and backward.

A program takes all channels of some tokens at a time, so that x is read once and each result is written once: in a
16-bit dtype 4 bytes per value forward and 6 backward.

All arithmetic is float32. The sums over tokens leave each program as a partial sum in a place of its own and are added
in a fixed order afterwards: no atomics, the same bits in every run. Token numbers are 64-bit. Block sizes and warps
are the fastest of some that were tried on an H100.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import add_partial_sums
from ..triton_backend import ceil_div, launch, register
from .reference import layer_norm_backward_reference, layer_norm_reference

BLOCK_VALUES = 1024
"""Values of a tile, if a token has no more."""
VALUES = 16
"""Values of a thread."""
TARGET_PROGRAMS = 1024
"""Programs of backward that are enough to fill a GPU; beyond, each takes several tiles: partial sums stay few."""


@triton.jit
def _locate(tile, tokens, E, EXACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the tokens of a tile, the offsets of their values, and which of them there are."""
    t = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < tokens)[:, None] & ((e < E) | EXACT)[None, :]
    return t, t[:, None] * E + e[None, :], inside


@triton.jit
def _load_row(ptr, E, default, EXISTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Loads a parameter as a row, the default if there is none."""
    e = tl.arange(0, BLOCK_E)
    row = tl.load(ptr + e, mask=e < E, other=0.0) if EXISTS else tl.full((BLOCK_E,), default, tl.float32)
    return row[None, :]


@triton.jit(do_not_specialize=['tokens'])
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, inverse_ptr, tokens, E, eps,
    WITH_WEIGHT: tl.constexpr, WITH_BIAS: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Normalizes some tokens.

    Grid: blocks of tokens. Reads x of its tokens; writes out, and mean and inverse deviation of each token.
    """
    t, offset, inside = _locate(tl.program_id(0), tokens, E, EXACT, BLOCK_T, BLOCK_E)
    weight = _load_row(weight_ptr, E, 1.0, WITH_WEIGHT, BLOCK_E)
    bias = _load_row(bias_ptr, E, 0.0, WITH_BIAS, BLOCK_E)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / E
    centred = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / E + eps)
    out = centred * inverse[:, None] * weight + bias
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + t, mean, mask=t < tokens)
    tl.store(inverse_ptr + t, inverse, mask=t < tokens)


@triton.jit(do_not_specialize=['tokens'], do_not_specialize_on_alignment=['tiles'])
def layer_norm_backward_kernel(
    dout_ptr, x_ptr, mean_ptr, inverse_ptr, weight_ptr, dx_ptr, sums_ptr, tokens, E, tiles,
    WITH_WEIGHT: tl.constexpr, WITH_BIAS: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of some tokens.

    Grid: blocks of tiles. Reads dout, x and the statistics of its tokens; writes dx and, if there is a parameter, the
    sums over its tokens of the gradients of weight and bias (blocks, 2, E), 0 for one that is not there.
    """
    block = tl.program_id(0)
    weight = _load_row(weight_ptr, E, 1.0, WITH_WEIGHT, BLOCK_E)
    dweight = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    dbias = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(tiles):
        t, offset, inside = _locate(block * tiles + i, tokens, E, EXACT, BLOCK_T, BLOCK_E)
        dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + t, mask=t < tokens, other=0.0)[:, None]
        inverse = tl.load(inverse_ptr + t, mask=t < tokens, other=0.0)[:, None]
        norm = tl.where(inside, (x - mean) * inverse, 0.0)
        if WITH_WEIGHT:
            dweight += dout * norm
        if WITH_BIAS:
            dbias += dout
        dnorm = dout * weight
        along_norm = tl.sum(dnorm * norm, 1)[:, None] / E
        dx = inverse * (dnorm - tl.sum(dnorm, 1)[:, None] / E - norm * along_norm)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WITH_WEIGHT or WITH_BIAS:
        e = tl.arange(0, BLOCK_E)
        sums_ptr += 2 * block.to(tl.int64) * E
        tl.store(sums_ptr + e, tl.sum(dweight, 0), mask=e < E)
        tl.store(sums_ptr + E + e, tl.sum(dbias, 0), mask=e < E)


def _launch(x: torch.Tensor) -> tuple[int, int, dict[str, int | bool]]:
    """Returns the numbers of tokens and of tiles of a map (..., E) and the constants of the kernels."""
    E = x.shape[-1]
    wide = triton.next_power_of_2(E)
    rows = max(1, BLOCK_VALUES // wide)
    tokens = x.numel() // E
    constants = {
        'EXACT': wide == E, 'BLOCK_T': rows, 'BLOCK_E': wide, 'num_warps': max(BLOCK_VALUES, wide) // (32 * VALUES),
        'num_stages': 1,
    }  # fmt: skip
    return tokens, ceil_div(tokens, rows), constants


def layer_norm(x, weight, bias, eps, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the op `layer_norm`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, inverse = (torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) for _ in range(2))
    tokens, tiles, constants = _launch(x)
    # The kernels do not touch a parameter that is not there; a pointer has to be there all the same.
    launch(
        layer_norm_kernel, tiles, x, mean if weight is None else weight.contiguous(),
        mean if bias is None else bias.contiguous(), out, mean, inverse, tokens, x.shape[-1], eps,
        WITH_WEIGHT=weight is not None, WITH_BIAS=bias is not None, **constants,
    )  # fmt: skip
    return out, mean, inverse


def layer_norm_backward(dout, x, mean, inverse, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the op `layer_norm_backward`."""
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, all_tiles, constants = _launch(x)
    tiles = max(1, all_tiles // TARGET_PROGRAMS)
    blocks = ceil_div(all_tiles, tiles)
    with_weight, with_bias = weight is not None, bias is not None
    sums = torch.empty(blocks if with_weight or with_bias else 0, 2, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(
        layer_norm_backward_kernel, blocks, dout, x, mean, inverse, weight.contiguous() if with_weight else mean, dx,
        sums, tokens, x.shape[-1], tiles, WITH_WEIGHT=with_weight, WITH_BIAS=with_bias, **constants,
    )  # fmt: skip
    (sums,) = add_partial_sums((sums, torch.float32))
    return dx, sums


register('layer_norm', layer_norm, layer_norm_reference)
register('layer_norm_backward', layer_norm_backward, layer_norm_backward_reference)
