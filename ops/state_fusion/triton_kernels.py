"""Triton kernels of the state fusion, forward and backward, with the observation as part of them.

A program computes ``BLOCK_H`` rows of ``BLOCK_W`` columns and ``BLOCK_E`` channels. With 25 loads for each output the
first-level cache would be the limit. So the outer loop runs over the columns that taps can be away, the next over the
source rows: what is loaded once serves every output row that has a tap there (18.5 loads an output for 4 rows), and
only the taps of one column, seven at most, need registers. All loops are unrolled and the taps' indices are constants.

All arithmetic is float32. No atomics: partial sums are added in a fixed order afterwards. Element offsets are 64-bit.
The block sizes were chosen from register counts: none is measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

from ..triton_backend import register, uniform_tokens
from .reference import state_fusion_backward_reference, state_fusion_reference
from .taps import RADIUS, TAP_OFFSETS

BLOCK_H = 4
"""Rows of a program's output. Eight would save loads, but need all registers, and compile for half a minute."""
BLOCK_E = 32
"""Channels of a program's output."""
BLOCK_W = (16, 32)
"""Columns of a program's output, on maps up to 16 columns and on wider ones."""
BLOCK_P = 16
"""Border pixels of a program."""

_REACH = range(-RADIUS, RADIUS + 1)
_INDICES = {offset: k for k, offset in enumerate(TAP_OFFSETS)}

R = tl.constexpr(RADIUS)
TAPS = tl.constexpr(len(TAP_OFFSETS))
TAP_TABLE = tl.constexpr(tuple(tuple(_INDICES.get((y, x), -1) for x in _REACH) for y in _REACH))


@triton.constexpr_function
def _tap(down, right):
    """Returns the index of the tap at an offset, -1 if there is none."""
    inside = down >= -R and down <= R and right >= -R and right <= R
    return TAP_TABLE[down + R][right + R] if inside else -1


@triton.constexpr_function
def _distance(offset):
    return offset if offset >= 0 else -offset


@triton.jit
def _locate(H, W, E, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns image, first row, columns, channel block and channels of this program."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    across = tl.cdiv(W, BLOCK_W)
    down = tl.cdiv(H, BLOCK_H)
    block = pid % blocks
    x0 = pid // blocks % across * BLOCK_W
    y0 = pid // (blocks * across) % down * BLOCK_H
    n = (pid // (blocks * across) // down).to(tl.int64)
    return n, y0, x0 + tl.arange(0, BLOCK_W), block, block * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def _load(ptr, start, x, e, inside, E):
    """Loads tokens start + x of a contiguous (..., E) tensor as float32, 0 if not inside.

    The offset of x is a vector that does not depend on the row: the compiler computes it once for many rows.
    """
    columns = x.to(tl.int64)[:, None] * E + e[None, :]
    return tl.load(ptr + start * E + columns, mask=inside[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, start, x, e, inside, E):
    """Stores tokens start + x of a contiguous (..., E) tensor, where they are inside."""
    columns = x.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(ptr + start * E + columns, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def _load_tokens(ptr, n, token, inside, stride_n, stride_t):
    """Loads one value for each token (64-bit) of an image, as a column vector in float32, 0 if not inside."""
    return tl.load(ptr + n * stride_n + token * stride_t, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_gradient(dy_ptr, C_ptr, n, y, x, e, H, W, E, stride_Cn, stride_Ct, OBSERVED: tl.constexpr):
    """Loads the gradient of the fused states: dy, times C if the states were observed; 0 outside the grid."""
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    dg = _load(dy_ptr, (n * H + y) * W, x, e, inside, E)
    if OBSERVED:
        dg *= _load_tokens(C_ptr, n, y.to(tl.int64) * W + x, inside, stride_Cn, stride_Ct)
    return dg


@triton.jit
def _load_clamped(h_ptr, n, y, x, e, H, W, E):
    """Loads states as float32, from the border where an index is outside the grid."""
    y = tl.minimum(tl.maximum(y, 0), H - 1)
    x = tl.minimum(tl.maximum(x, 0), W - 1)
    return _load(h_ptr, (n * H + y) * W, x, e, x >= 0, E)


@triton.jit
def _add_taps(totals, tile, taps_ptr, e, E, row: tl.constexpr, right: tl.constexpr, SIGN: tl.constexpr):
    """Adds a tile of a source row to the total of each output row, times the tap between them, if there is one.

    The tap is SIGN * (row - i) rows down from output row i. The compiler merges equal loads of taps: while a column of
    them is in use, it stays in registers.
    """
    updated = ()
    for i in tl.static_range(len(totals)):
        if _tap(SIGN * (row - i), right) >= 0:
            tap = tl.load(taps_ptr + _tap(SIGN * (row - i), right) * E + e, mask=e < E, other=0.0)
            updated += (totals[i] + tap[None, :] * tile,)
        else:
            updated += (totals[i],)
    return updated


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns a tuple of tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((BLOCK_W, BLOCK_E), tl.float32),)
    return tiles


@triton.jit
def fusion_kernel(
    h_ptr, taps_ptr, g_ptr, C_ptr, u_ptr, D_ptr, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the fused states of one block and, if OBSERVED, their observation ``g C + D u`` instead.

    Grid: images x row blocks x column blocks x channel blocks. Reads h of its block and of the 5 rows and columns
    around it, taps and, if OBSERVED, u and C of its block; writes g of its block.
    """
    n, y0, x, _, e = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    g = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    for right in tl.static_range(-R, R + 1):
        if _tap(0, right) >= 0:
            for row in tl.static_range(-R, BLOCK_H + R):
                h = _load_clamped(h_ptr, n, y0 + row, x + right, e, H, W, E)
                g = _add_taps(g, h, taps_ptr, e, E, row, right, 1)
    for i in tl.static_range(BLOCK_H):
        y = y0 + i
        inside = (x < W) & (y < H)
        result = g[i]
        if OBSERVED:
            D = tl.load(D_ptr + e, mask=e < E, other=0.0)[None, :]
            u = _load(u_ptr, (n * H + y) * W, x, e, inside, E)
            C = _load_tokens(C_ptr, n, y.to(tl.int64) * W + x, inside, stride_Cn, stride_Ct)
            result = result * C + D * u
        _store(g_ptr, result, (n * H + y) * W, x, e, inside, E)


@triton.jit
def taps_gradient_kernel(
    dy_ptr, h_ptr, taps_ptr, C_ptr, dtaps_ptr, dC_ptr, N, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes what one block adds to the gradient of the taps and, if OBSERVED, to that of C.

    Grid: images x row blocks x column blocks x channel blocks. Reads dy of its block, h of its block and of the 5 rows
    and columns around it, and, if OBSERVED, C and the taps. Writes the sum over its tokens, dtaps (token blocks, 25,
    E), and, if OBSERVED, the sum over its channels, dC (channel blocks, N, HW).
    """
    n, y0, x, block, e = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    dg = ()
    for i in tl.static_range(BLOCK_H):
        dg += (_load_gradient(dy_ptr, C_ptr, n, y0 + i, x, e, H, W, E, stride_Cn, stride_Ct, OBSERVED),)
    g = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    sums_ptr = dtaps_ptr + (tl.program_id(0) // tl.cdiv(E, BLOCK_E)).to(tl.int64) * TAPS * E
    for right in tl.static_range(-R, R + 1):
        if _tap(0, right) >= 0:
            sums = _zeros(2 * R + 1, BLOCK_W, BLOCK_E)
            for row in tl.static_range(-R, BLOCK_H + R):
                h = _load_clamped(h_ptr, n, y0 + row, x + right, e, H, W, E)
                updated = ()
                for down in tl.static_range(-R, R + 1):
                    if _tap(down, right) >= 0 and row - down >= 0 and row - down < BLOCK_H:
                        updated += (sums[down + R] + dg[row - down] * h,)
                    else:
                        updated += (sums[down + R],)
                sums = updated
                if OBSERVED:
                    g = _add_taps(g, h, taps_ptr, e, E, row, right, 1)
            for down in tl.static_range(-R, R + 1):
                if _tap(down, right) >= 0:
                    tl.store(sums_ptr + _tap(down, right) * E + e, tl.sum(sums[down + R], 0), mask=e < E)
    if OBSERVED:
        for i in tl.static_range(BLOCK_H):
            inside = (x < W) & (y0 + i < H)
            dC = tl.sum(g[i] * _load(dy_ptr, (n * H + y0 + i) * W, x, e, inside, E), 1)
            row_ptr = dC_ptr + ((block.to(tl.int64) * N + n) * H + y0 + i) * W
            tl.store(row_ptr + x, dC, mask=inside)


@triton.jit
def adjoint_kernel(
    dy_ptr, taps_ptr, dh_ptr, C_ptr, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the states of one block as if the states were padded with zeros.

    Grid: images x row blocks x column blocks x channel blocks. Reads dy (and C, if OBSERVED) of its block and of the 5
    rows and columns around it, and the taps; writes dh of its block. Right but for the border of the grid.
    """
    n, y0, x, _, e = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    dh = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    for right in tl.static_range(-R, R + 1):
        if _tap(0, right) >= 0:
            for row in tl.static_range(-R, BLOCK_H + R):
                dg = _load_gradient(dy_ptr, C_ptr, n, y0 + row, x - right, e, H, W, E, stride_Cn, stride_Ct, OBSERVED)
                dh = _add_taps(dh, dg, taps_ptr, e, E, row, right, -1)
    for i in tl.static_range(BLOCK_H):
        _store(dh_ptr, dh[i], (n * H + y0 + i) * W, x, e, (x < W) & (y0 + i < H), E)


@triton.jit
def adjoint_border_kernel(
    dy_ptr, taps_ptr, dh_ptr, C_ptr, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the states on the border of the grid.

    Grid: images x 4 sides x blocks along a side x channel blocks. Reads dy (and C, if OBSERVED) around its pixels and
    the taps; writes dh of its pixels over what `adjoint_kernel` wrote there. The two sides at a corner write the same.

    A state passes through the tap at (down, right) to the output that lies (down, right) before it. One on the border
    passes also to every output whose offset leaves the grid and is clamped to it: on the first row, with down < 0, to
    the rows 0 .. -down - 1 besides; on the last one, with down > 0, to the last ``down`` rows besides; columns alike.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    along = tl.cdiv(tl.maximum(H, W), BLOCK_P)
    e = pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    p = pid // blocks % along * BLOCK_P + tl.arange(0, BLOCK_P)
    side = pid // (blocks * along) % 4
    n = (pid // (blocks * along) // 4).to(tl.int64)
    y = tl.where(side == 0, 0, tl.where(side == 1, H - 1, tl.minimum(p, H - 1)))
    x = tl.where(side == 2, 0, tl.where(side == 3, W - 1, tl.minimum(p, W - 1)))

    # Most blocks hold no corner: their pixels gather in one direction only.
    top, bottom = tl.min(y, 0) == 0, tl.max(y, 0) == H - 1
    left_end, right_end = tl.min(x, 0) == 0, tl.max(x, 0) == W - 1
    dh = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    for down in tl.static_range(-R, R + 1):
        for right in tl.static_range(-R, R + 1):
            if _tap(down, right) >= 0:
                tap = tl.load(taps_ptr + _tap(down, right) * E + e, mask=e < E, other=0.0)[None, :]
                first_y = tl.maximum(tl.where(y == 0, 0, y - down), 0)
                last_y = tl.minimum(tl.where(y == H - 1, H - 1, y - down), H - 1)
                first_x = tl.maximum(tl.where(x == 0, 0, x - right), 0)
                last_x = tl.minimum(tl.where(x == W - 1, W - 1, x - right), W - 1)
                rows = tl.where(top if down < 0 else bottom, 1 + _distance(down), 1)
                columns = tl.where(left_end if right < 0 else right_end, 1 + _distance(right), 1)
                for i in range(rows):
                    for j in range(columns):
                        inside = (first_y + i <= last_y) & (first_x + j <= last_x)
                        token = (first_y + i).to(tl.int64) * W + first_x + j
                        dg = _load(dy_ptr, n * H * W, token, e, inside, E)
                        if OBSERVED:
                            dg *= _load_tokens(C_ptr, n, token, inside, stride_Cn, stride_Ct)
                        dh += tap * dg
    _store(dh_ptr, dh, n * H * W, y.to(tl.int64) * W + x, e, x >= 0, E)


def _launch(shape: torch.Size) -> tuple[tuple[int], dict[str, int]]:
    """Returns grid and constants of a kernel whose programs compute blocks of a map (N, H, W, E)."""
    N, H, W, E = shape
    narrow, wide = BLOCK_W
    columns = narrow if narrow >= W else wide
    grid = N * triton.cdiv(H, BLOCK_H) * triton.cdiv(W, columns) * triton.cdiv(E, BLOCK_E)
    return (grid,), {'BLOCK_H': BLOCK_H, 'BLOCK_W': columns, 'BLOCK_E': BLOCK_E, 'num_warps': 8 if columns >= 32 else 4}


def fuse(h: torch.Tensor, taps: torch.Tensor, dtype: torch.dtype, C=None, u=None, D=None) -> torch.Tensor:
    """Returns the fused states in the given dtype or, if C is given, their observation ``g C + D u``.

    Args:
        h: States, contiguous, (N, H, W, E).
        taps: Weights, (25, E), float32.
        dtype: Of the result.
        C: Output weight of each token, (N, H, W, 1), any strides.
        u: Input, contiguous, shape of h; with C only.
        D: Skip weight, (E,), float32; with C only.
    """
    _, H, W, E = h.shape
    grid, constants = _launch(h.shape)
    taps = taps.contiguous()
    observed = C is not None
    # The kernel does not touch the observation's arguments without one; pointers have to be there all the same.
    C, u, D = (uniform_tokens(C), u, D.contiguous()) if observed else (h, h, taps)
    g = torch.empty(h.shape, dtype=dtype, device=h.device)
    fusion_kernel[grid](h, taps, g, C, u, D, H, W, E, C.stride(0), C.stride(1), OBSERVED=observed, **constants)
    return g


def fuse_backward(dy: torch.Tensor, h: torch.Tensor, taps: torch.Tensor, dtype: torch.dtype, C=None) -> tuple:
    """Returns dh in the given dtype, dtaps (25, E) and, if C is given, dC (N, HW) in float32, otherwise None.

    Args:
        dy: Gradient of the fused states, contiguous, (N, H, W, E); of their observation, if C is given.
        h: States, contiguous, (N, H, W, E).
        taps: Weights, (25, E), float32.
        dtype: Of dh.
        C: Output weight of each token, (N, H, W, 1), any strides.
    """
    N, H, W, E = h.shape
    taps = taps.contiguous()
    observed = C is not None
    C = uniform_tokens(C) if observed else h
    strides = (C.stride(0), C.stride(1))

    grid, constants = _launch(h.shape)
    blocks = triton.cdiv(E, BLOCK_E)
    dtaps = torch.empty(grid[0] // blocks, *taps.shape, dtype=torch.float32, device=h.device)
    dC = torch.empty(blocks, N, H * W, dtype=torch.float32, device=h.device) if observed else dtaps
    taps_gradient_kernel[grid](dy, h, taps, C, dtaps, dC, N, H, W, E, *strides, OBSERVED=observed, **constants)
    dh = torch.empty(h.shape, dtype=dtype, device=h.device)
    adjoint_kernel[grid](dy, taps, dh, C, H, W, E, *strides, OBSERVED=observed, **constants)
    grid = (N * 4 * triton.cdiv(max(H, W), BLOCK_P) * blocks,)
    adjoint_border_kernel[grid](
        dy, taps, dh, C, H, W, E, *strides, OBSERVED=observed, BLOCK_P=BLOCK_P, BLOCK_E=BLOCK_E, num_warps=4
    )
    return dh, dtaps.sum(0), dC.sum(0) if observed else None


def state_fusion(h, taps) -> torch.Tensor:
    """Computes the op `state_fusion`."""
    return fuse(h.contiguous(), taps, h.dtype)


def state_fusion_backward(dg, h, taps) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the op `state_fusion_backward`."""
    dh, dtaps, _ = fuse_backward(dg.contiguous(), h.contiguous(), taps, h.dtype)
    return dh, dtaps


register('state_fusion', state_fusion, state_fusion_reference)
register('state_fusion_backward', state_fusion_backward, state_fusion_backward_reference)
