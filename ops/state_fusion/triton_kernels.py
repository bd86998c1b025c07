"""Triton kernels of the state fusion, forward and backward, with the observation as part of them.

A program computes ``BLOCK_H`` rows of ``BLOCK_W`` columns and ``BLOCK_E`` channels. With 25 loads for each output the
first-level cache would be the limit. So the outer loops run over the columns that taps can be away, the next over the
source rows: what is loaded once serves every output row that has a tap there (17.5 loads an output for 4 rows), and
only the taps of one column, seven at most, need registers. The loop over the two sides of a dilation is a loop of the
machine too: it halves the code and the time to compile it, and no load moves to another column and waits there in
registers. All others are unrolled, and the taps' indices are constants.

Of the instructions, those that compute are to be the most: a load that cannot be outside has no mask, and offsets
inside of an image have 32 bits unless it is too large (WIDE).

Backward writes the gradient of the fused states once in float32, where the taps' gradient needs it anyway: its adjoint
reads it for 25 outputs.

All arithmetic is float32. No atomics: partial sums are added in a fixed order afterwards. Offsets between images are
64-bit.
The block sizes were chosen from what the compiler reports; five others that were tried on an H100 are no more than 2 %
faster.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import add_partial_sums
from ..triton_backend import ceil_div, launch, register, uniform_tokens
from .reference import state_fusion_backward_reference, state_fusion_reference
from .taps import RADIUS, TAP_OFFSETS

BLOCK_H = 4
"""Rows of a program's output."""
BLOCK_E = 32
"""Channels of a program's output."""
BLOCK_W = (16, 32)
"""Columns of a program's output: the wider block unless it has more columns past the edge of the map."""
BLOCK_P = 16
"""Border pixels of a program."""
VALUES = 8
"""Values of one row that a thread computes, if no block is partly empty: masks take registers too."""

_REACH = RADIUS + BLOCK_H - 1
_INDICES = {offset: k for k, offset in enumerate(TAP_OFFSETS)}

R = tl.constexpr(RADIUS)
TAPS = tl.constexpr(len(TAP_OFFSETS))
TAP_TABLE = tl.constexpr(
    tuple(_INDICES.get((y, x), -1) for y in range(-_REACH, _REACH + 1) for x in range(-RADIUS, RADIUS + 1))
)
"""Index of the tap at each offset (rows, columns) that loops ask for, -1 where there is none."""
ROW = tl.constexpr(2 * RADIUS + 1)
CENTRE = tl.constexpr(_REACH * (2 * RADIUS + 1) + RADIUS)


@triton.jit
def _locate(H, W, E, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns image, first row, columns, channel block and channels of this program."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    across = tl.cdiv(W, BLOCK_W)
    down = tl.cdiv(H, BLOCK_H)
    block, pid = pid % blocks, pid // blocks
    x0, pid = pid % across * BLOCK_W, pid // across
    y0, n = pid % down * BLOCK_H, (pid // down).to(tl.int64)
    return n, y0, x0 + tl.arange(0, BLOCK_W), block, block * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def _inside(e, E, EVEN: tl.constexpr):
    """Says which channels exist. The compiler drops a mask that it knows to be true."""
    return tl.full(e.shape, True, tl.int1) if EVEN else e < E


@triton.jit
def _at(start, x, e, E, WIDE: tl.constexpr):
    """Returns the offsets of tokens start (64-bit) + x of a contiguous (..., E) tensor.

    That of x is a vector that does not depend on the row: the compiler computes it once for many rows.
    """
    if WIDE:
        x = x.to(tl.int64)
    return start * E, x[:, None] * E + e[None, :]


@triton.jit
def _load(ptr, start, x, e, mask, E, WIDE: tl.constexpr):
    """Loads tokens start + x of a contiguous (..., E) tensor as float32, 0 where the mask is not."""
    row, columns = _at(start, x, e, E, WIDE)
    return tl.load((ptr + row) + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, start, x, e, mask, E, WIDE: tl.constexpr):
    """Stores tokens start + x of a contiguous (..., E) tensor."""
    row, columns = _at(start, x, e, E, WIDE)
    tl.store((ptr + row) + columns, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tokens(ptr, n, token, inside, stride_n, stride_t):
    """Loads one value for each token (64-bit) of an image, as a column vector in float32, 0 if not inside."""
    return tl.load(ptr + n * stride_n + token * stride_t, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_clamped(h_ptr, n, y, x, e, inside, H, W, E, WIDE: tl.constexpr, BY_ROW: tl.constexpr):
    """Loads states as float32, from the border where an index is outside the grid.

    The start of a row as a pointer of its own (BY_ROW) saves an addition for each load and takes registers.
    """
    y = tl.minimum(tl.maximum(y, 0), H - 1)
    x = tl.minimum(tl.maximum(x, 0), W - 1)
    if BY_ROW:
        h = _load(h_ptr, (n * H + y) * W, x, e, inside[None, :], E, WIDE)
    else:
        row = y.to(tl.int64) * W * E if WIDE else y * W * E
        _, columns = _at(0, x, e, E, WIDE)
        h = tl.load(h_ptr + n * H * W * E + (row + columns), mask=inside[None, :], other=0.0).to(tl.float32)
    return h


@triton.jit
def _tap(taps_ptr, down: tl.constexpr, away: tl.constexpr, side, e, inside, E):
    """Loads the tap at an offset that has one: ``away`` columns to the left if side is 0, to the right if it is 1.

    The compiler merges equal loads of taps: while a column of them is in use, it stays in registers.
    """
    left: tl.constexpr = TAP_TABLE[CENTRE + down * ROW - away]
    right: tl.constexpr = TAP_TABLE[CENTRE + down * ROW + away]
    return tl.load(taps_ptr + (left + side * (right - left)) * E + e, mask=inside, other=0.0)[None, :]


@triton.jit
def _add_taps(totals, tile, taps_ptr, e, inside, E, row: tl.constexpr, away: tl.constexpr, side, SIGN: tl.constexpr):
    """Adds a tile of a source row to the total of each output row, times the tap between them, if there is one.

    The tap is SIGN * (row - i) rows down from output row i.
    """
    updated = ()
    for i in tl.static_range(len(totals)):
        if TAP_TABLE[CENTRE + SIGN * (row - i) * ROW + away] >= 0:
            updated += (totals[i] + _tap(taps_ptr, SIGN * (row - i), away, side, e, inside, E) * tile,)
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


@triton.jit(do_not_specialize=['H', 'W', 'stride_Cn'], do_not_specialize_on_alignment=['C_ptr'])
def fusion_kernel(
    h_ptr, taps_ptr, g_ptr, C_ptr, u_ptr, D_ptr, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the fused states of one block and, if OBSERVED, their observation ``g C + D u`` instead.

    Grid: images x row blocks x column blocks x channel blocks. Reads h of its block and of the 5 rows and columns
    around it, taps and, if OBSERVED, u and C of its block; writes g of its block.
    """
    n, y0, x, _, e = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    inside = _inside(e, E, EVEN)
    g = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    for away in tl.static_range(R + 1):
        if TAP_TABLE[CENTRE + away] >= 0:
            for side in range(1 if away == 0 else 2):
                column = x + (2 * side - 1) * away
                for row in tl.static_range(-R, BLOCK_H + R):
                    h = _load_clamped(h_ptr, n, y0 + row, column, e, inside, H, W, E, WIDE, True)
                    g = _add_taps(g, h, taps_ptr, e, inside, E, row, away, side, 1)
    for i in tl.static_range(BLOCK_H):
        y = y0 + i
        token = (x < W) & (y < H)
        mask = token[:, None] & inside[None, :]
        start = (n * H + y) * W
        result = g[i]
        if OBSERVED:
            D = tl.load(D_ptr + e, mask=inside, other=0.0)[None, :]
            u = _load(u_ptr, start, x, e, mask, E, WIDE)
            C = _load_tokens(C_ptr, n, y.to(tl.int64) * W + x, token, stride_Cn, stride_Ct)
            result = result * C + D * u
        _store(g_ptr, result, start, x, e, mask, E, WIDE)


@triton.jit(do_not_specialize=['N', 'H', 'W', 'stride_Cn'], do_not_specialize_on_alignment=['C_ptr'])
def taps_gradient_kernel(
    dy_ptr, h_ptr, taps_ptr, C_ptr, dtaps_ptr, dC_ptr, dg_ptr, N, H, W, E, stride_Cn, stride_Ct,
    OBSERVED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes what one block adds to the gradient of the taps and, if OBSERVED, to that of C.

    Grid: images x row blocks x column blocks x channel blocks. Reads dy of its block, h of its block and of the 5 rows
    and columns around it, and, if OBSERVED, C and the taps. Writes the sum over its tokens, dtaps (token blocks, 25,
    E), and, if OBSERVED, the sum over its channels, dC (channel blocks, N, HW), and the gradient of the fused states of
    its block, dg = dy C.
    """
    n, y0, x, block, _ = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    # A thread takes four channels of two tokens, rather than eight of one: fewer taps and sums over tokens for each.
    e = tl.max_contiguous(block * BLOCK_E + tl.arange(0, BLOCK_E), 4)
    inside = _inside(e, E, EVEN)
    dg = ()
    for i in tl.static_range(BLOCK_H):
        y = y0 + i
        token = (x < W) & (y < H)
        mask = token[:, None] & inside[None, :]
        start = (n * H + y) * W
        gradient = _load(dy_ptr, start, x, e, mask, E, WIDE)
        if OBSERVED:
            gradient *= _load_tokens(C_ptr, n, y.to(tl.int64) * W + x, token, stride_Cn, stride_Ct)
            _store(dg_ptr, gradient, start, x, e, mask, E, WIDE)
        dg += (gradient,)
    g = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    sums_ptr = dtaps_ptr + (tl.program_id(0) // tl.cdiv(E, BLOCK_E)).to(tl.int64) * TAPS * E
    for away in tl.static_range(R + 1):
        if TAP_TABLE[CENTRE + away] >= 0:
            for side in range(1 if away == 0 else 2):
                column = x + (2 * side - 1) * away
                sums = _zeros(2 * R + 1, BLOCK_W, BLOCK_E)
                for row in tl.static_range(-R, BLOCK_H + R):
                    h = _load_clamped(h_ptr, n, y0 + row, column, e, inside, H, W, E, WIDE, False)
                    updated = ()
                    for down in tl.static_range(-R, R + 1):
                        if row - down >= 0 and row - down < BLOCK_H:
                            updated += (sums[down + R] + dg[row - down] * h,)
                        else:
                            updated += (sums[down + R],)
                    sums = updated
                    if OBSERVED:
                        g = _add_taps(g, h, taps_ptr, e, inside, E, row, away, side, 1)
                for down in tl.static_range(-R, R + 1):
                    if TAP_TABLE[CENTRE + down * ROW - away] >= 0:
                        left = TAP_TABLE[CENTRE + down * ROW - away]
                        k = left + side * (TAP_TABLE[CENTRE + down * ROW + away] - left)
                        tl.store(sums_ptr + k * E + e, tl.sum(sums[down + R], 0), mask=inside)
    if OBSERVED:
        for i in tl.static_range(BLOCK_H):
            y = y0 + i
            token = (x < W) & (y < H)
            dy = _load(dy_ptr, (n * H + y) * W, x, e, token[:, None] & inside[None, :], E, WIDE)
            row_ptr = dC_ptr + ((block.to(tl.int64) * N + n) * H + y) * W
            tl.store(row_ptr + x, tl.sum(g[i] * dy, 1), mask=token)


@triton.jit(do_not_specialize=['H', 'W'])
def adjoint_kernel(
    dg_ptr, taps_ptr, dh_ptr, H, W, E, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the states of one block as if the states were padded with zeros.

    Grid: images x row blocks x column blocks x channel blocks. Reads dg, the gradient of the fused states, of its block
    and of the 5 rows and columns around it, and the taps; writes dh of its block. Right but for the border of the grid.
    """
    n, y0, x, _, e = _locate(H, W, E, BLOCK_H, BLOCK_W, BLOCK_E)
    inside = _inside(e, E, EVEN)
    dh = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
    for away in tl.static_range(R + 1):
        if TAP_TABLE[CENTRE + away] >= 0:
            for side in range(1 if away == 0 else 2):
                column = x - (2 * side - 1) * away
                for row in tl.static_range(-R, BLOCK_H + R):
                    y = y0 + row
                    token = (column >= 0) & (column < W) & (y >= 0) & (y < H)
                    dg = _load(dg_ptr, (n * H + y) * W, column, e, token[:, None] & inside[None, :], E, WIDE)
                    dh = _add_taps(dh, dg, taps_ptr, e, inside, E, row, away, side, -1)
    for i in tl.static_range(BLOCK_H):
        token = (x < W) & (y0 + i < H)
        _store(dh_ptr, dh[i], (n * H + y0 + i) * W, x, e, token[:, None] & inside[None, :], E, WIDE)


@triton.jit(do_not_specialize=['H', 'W'])
def adjoint_border_kernel(
    dg_ptr, taps_ptr, dh_ptr, H, W, E, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Computes the gradient of the states on the border of the grid.

    Grid: images x 4 sides x blocks along a side x channel blocks. Reads dg, the gradient of the fused states, around
    its pixels and the taps; writes dh of its pixels over what `adjoint_kernel` wrote there. The two sides at a corner
    write the same.

    A state passes through the tap at (down, right) to the output that lies (down, right) before it. One on the border
    passes also to every output whose offset leaves the grid and is clamped to it: on the first row, with down < 0, to
    the rows 0 .. -down - 1 besides; on the last one, with down > 0, to the last ``down`` rows besides; columns alike.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    along = tl.cdiv(tl.maximum(H, W), BLOCK_P)
    e = pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    channels = _inside(e, E, EVEN)
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
            if TAP_TABLE[CENTRE + down * ROW + right] >= 0:
                tap = _tap(taps_ptr, down, right, 1, e, channels, E)
                first_y = tl.maximum(tl.where(y == 0, 0, y - down), 0)
                last_y = tl.minimum(tl.where(y == H - 1, H - 1, y - down), H - 1)
                first_x = tl.maximum(tl.where(x == 0, 0, x - right), 0)
                last_x = tl.minimum(tl.where(x == W - 1, W - 1, x - right), W - 1)
                rows = tl.where(top if down < 0 else bottom, 1 + (down if down > 0 else -down), 1)
                columns = tl.where(left_end if right < 0 else right_end, 1 + (right if right > 0 else -right), 1)
                for i in range(rows):
                    for j in range(columns):
                        token = (first_y + i <= last_y) & (first_x + j <= last_x)
                        at = ((first_y + i) * W + first_x + j).to(tl.int64)
                        dh += tap * _load(dg_ptr, n * H * W, at, e, token[:, None] & channels[None, :], E, True)
    _store(dh_ptr, dh, n * H * W, y.to(tl.int64) * W + x, e, channels[None, :], E, True)


def _blocks(shape: torch.Size) -> tuple[int, dict[str, int]]:
    """Returns the number of programs that compute blocks of a map (N, H, W, E), and their constants."""
    N, H, W, E = shape
    columns = min(reversed(BLOCK_W), key=lambda block: ceil_div(W, block) * block)
    programs = N * ceil_div(H, BLOCK_H) * ceil_div(W, columns) * ceil_div(E, BLOCK_E)
    even = E % BLOCK_E == 0
    return programs, {
        'EVEN': even,
        'WIDE': H * (W + BLOCK_W[-1]) * E >= 2**31,
        'BLOCK_H': BLOCK_H,
        'BLOCK_W': columns,
        'BLOCK_E': BLOCK_E,
        'num_stages': 1,
        'num_warps': max(1, columns * BLOCK_E // (32 * VALUES)) * (1 if even else 2),
    }


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
    programs, constants = _blocks(h.shape)
    taps = taps.contiguous()
    observed = C is not None
    # The kernel does not touch the observation's arguments without one; pointers have to be there all the same.
    C, u, D = (uniform_tokens(C), u, D.contiguous()) if observed else (h, h, taps)
    g = torch.empty(h.shape, dtype=dtype, device=h.device)
    launch(
        fusion_kernel, programs, h, taps, g, C, u, D, H, W, E, C.stride(0), C.stride(1), OBSERVED=observed, **constants
    )
    return g


def fuse_backward(dy: torch.Tensor, h: torch.Tensor, taps: torch.Tensor, dtype: torch.dtype, C=None) -> tuple:
    """Returns dh in the given dtype, partial sums of dtaps, (any, 25, E), and, if C is given, of dC, (any, N, HW).

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

    programs, constants = _blocks(h.shape)
    blocks = ceil_div(E, BLOCK_E)
    dtaps = torch.empty(programs // blocks, *taps.shape, dtype=torch.float32, device=h.device)
    dC = torch.empty(blocks, N, H * W, dtype=torch.float32, device=h.device) if observed else dtaps
    dg = torch.empty(h.shape, dtype=torch.float32, device=h.device) if observed else dy
    launch(
        taps_gradient_kernel, programs, dy, h, taps, C, dtaps, dC, dg, N, H, W, E, C.stride(0), C.stride(1),
        OBSERVED=observed, **constants,
    )  # fmt: skip
    dh = torch.empty(h.shape, dtype=dtype, device=h.device)
    launch(adjoint_kernel, programs, dg, taps, dh, H, W, E, **constants)
    launch(
        adjoint_border_kernel, N * 4 * ceil_div(max(H, W), BLOCK_P) * blocks, dg, taps, dh, H, W, E,
        EVEN=constants['EVEN'], BLOCK_P=BLOCK_P, BLOCK_E=BLOCK_E, num_stages=1,
        num_warps=1 if constants['EVEN'] else 2,
    )  # fmt: skip
    return dh, dtaps, dC if observed else None


def state_fusion(h, taps) -> torch.Tensor:
    """Computes the op `state_fusion`."""
    return fuse(h.contiguous(), taps, h.dtype)


def state_fusion_backward(dg, h, taps) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the op `state_fusion_backward`."""
    dh, dtaps, _ = fuse_backward(dg.contiguous(), h.contiguous(), taps, h.dtype)
    (dtaps,) = add_partial_sums((dtaps, torch.float32))
    return dh, dtaps


register('state_fusion', state_fusion, state_fusion_reference)
register('state_fusion_backward', state_fusion_backward, state_fusion_backward_reference)
