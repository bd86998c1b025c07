"""Triton kernels of the gated norm, forward and backward.

A program takes all channels of some tokens at a time, so that y and z are read once and each result is written once: of
46 bytes per value that PyTorch's functions move in a 16-bit dtype, 6 are left, and in backward 12 with the output.

All arithmetic is float32. The sums over tokens leave each program as a partial sum in a place of its own and are added
in a fixed order afterwards: no atomics, the same bits in every run. Token numbers are 64-bit. Block sizes and warps
are the fastest of some that were tried on an H100.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import add_partial_sums
from ..triton_backend import ceil_div, launch, register, uniform_tokens
from .reference import gated_norm_backward_reference, gated_norm_reference

BLOCK_VALUES = 1024
"""Values of a tile, if a token has no more."""
VALUES = 16
"""Values of a thread."""
TARGET_PROGRAMS = 1024
"""Programs of backward that are enough to fill a GPU; beyond, each takes several tiles: partial sums stay few."""


@triton.jit
def _load_map(ptr, t, e, inside, E):
    """Loads tokens of a contiguous map as float32, 0 if not inside."""
    return tl.load(ptr + t[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_gate(ptr, t, e, inside, L, stride_n, stride_t):
    """Loads tokens of a map whose images and tokens have strides as float32, 0 if not inside."""
    start = t // L * stride_n + t % L * stride_t
    return tl.load(ptr + start[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_map(ptr, value, t, e, inside, E):
    """Stores tokens of a contiguous map, where they are inside."""
    tl.store(ptr + t[:, None] * E + e[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalize(y, inside, E, eps):
    """Returns tokens less their mean over their deviation, and one over the deviation; 0 if not inside."""
    centred = tl.where(inside, y - tl.sum(y, 1)[:, None] / E, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / E + eps)
    return tl.where(inside, centred * inverse, 0.0), inverse


@triton.jit(do_not_specialize=['tokens', 'L'])
def gated_norm_kernel(
    y_ptr, z_ptr, weight_ptr, bias_ptr, out_ptr, tokens, L, E, stride_zn, stride_zt, eps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gated norm of some tokens.

    Grid: blocks of tokens. Reads y and z of its tokens, writes out.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < tokens)[:, None] & (e < E)[None, :]
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0)[None, :]
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    norm, _ = _normalize(_load_map(y_ptr, t, e, inside, E), inside, E, eps)
    z = _load_gate(z_ptr, t, e, inside, L, stride_zn, stride_zt)
    _store_map(out_ptr, (norm * weight + bias) * z * tl.sigmoid(z), t, e, inside, E)


@triton.jit(do_not_specialize=['tokens', 'L'], do_not_specialize_on_alignment=['tiles'])
def gated_norm_backward_kernel(
    dout_ptr, y_ptr, z_ptr, weight_ptr, bias_ptr, dy_ptr, dz_ptr, out_ptr, sums_ptr,
    tokens, L, E, tiles, stride_zn, stride_zt, eps,
    WITH_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of some tokens and, if WITH_OUT, the gated norm itself.

    Grid: blocks of tiles. Reads dout, y and z of its tokens; writes dy, dz and, if WITH_OUT, out, and the sums over its
    tokens of dweight and dbias (blocks, 2, E).
    """
    block = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0)[None, :]
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK_E,), tl.float32)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    for i in range(tiles):
        t = (block * tiles + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None] & (e < E)[None, :]
        dout = _load_map(dout_ptr, t, e, inside, E)
        norm, inverse = _normalize(_load_map(y_ptr, t, e, inside, E), inside, E, eps)
        z = _load_gate(z_ptr, t, e, inside, L, stride_zn, stride_zt)
        sigmoid = tl.sigmoid(z)
        gate = z * sigmoid
        scaled = norm * weight + bias
        if WITH_OUT:
            _store_map(out_ptr, scaled * gate, t, e, inside, E)
        _store_map(dz_ptr, dout * scaled * (sigmoid + gate * (1.0 - sigmoid)), t, e, inside, E)
        dscaled = dout * gate
        dweight += tl.sum(dscaled * norm, 0)
        dbias += tl.sum(dscaled, 0)
        dnorm = dscaled * weight
        along_norm = tl.sum(dnorm * norm, 1)[:, None] / E
        dy = inverse * (dnorm - tl.sum(dnorm, 1)[:, None] / E - norm * along_norm)
        _store_map(dy_ptr, dy, t, e, inside, E)
    tl.store(sums_ptr + 2 * block * E + e, dweight, mask=e < E)
    tl.store(sums_ptr + (2 * block + 1) * E + e, dbias, mask=e < E)


def _launch(y: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Returns the number of tiles of a map (N, H, W, E) and the constants of the kernels."""
    wide = triton.next_power_of_2(y.shape[-1])
    rows = max(1, BLOCK_VALUES // wide)
    tiles = ceil_div(y.shape[:-1].numel(), rows)
    return tiles, {'BLOCK_T': rows, 'BLOCK_E': wide, 'num_warps': max(BLOCK_VALUES, wide) // (32 * VALUES)}


def gated_norm(y, z, weight, bias, eps) -> torch.Tensor:
    """Computes the op `gated_norm`."""
    y, z = y.contiguous(), uniform_tokens(z)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    tiles, constants = _launch(y)
    N, L, E = z.shape
    launch(
        gated_norm_kernel, tiles, y, z, weight.contiguous(), bias.contiguous(), out, N * L, L, E, z.stride(0),
        z.stride(1), eps, **constants,
    )  # fmt: skip
    return out


def gated_norm_backward(dout, y, z, weight, bias, eps, with_out=False) -> tuple[torch.Tensor, ...]:
    """Computes the op `gated_norm_backward`."""
    dout, y, z = dout.contiguous(), y.contiguous(), uniform_tokens(z)
    dy, dz = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    out = torch.empty(y.shape if with_out else 0, dtype=y.dtype, device=y.device)
    all_tiles, constants = _launch(y)
    tiles = max(1, all_tiles // TARGET_PROGRAMS)
    blocks = ceil_div(all_tiles, tiles)
    N, L, E = z.shape
    sums = torch.empty(blocks, 2, E, dtype=torch.float32, device=y.device)
    launch(
        gated_norm_backward_kernel, blocks, dout, y, z, weight.contiguous(), bias.contiguous(), dy, dz, out, sums,
        N * L, L, E, tiles, z.stride(0), z.stride(1), eps, WITH_OUT=with_out, **constants,
    )  # fmt: skip
    (sums,) = add_partial_sums((sums, torch.float32))
    return dy, dz, sums, out


register('gated_norm', gated_norm, gated_norm_reference)
register('gated_norm_backward', gated_norm_backward, gated_norm_backward_reference)
