"""Triton kernels of the selective scan in several orders, forward and backward.

A program takes a square tile of positions and a block of channels. Of an order by rows the rows of a tile are chunks of
the scan, of one by columns its columns, so that one tile serves all orders: the carries of all of them are found in one
pass over u, and a second pass writes y, whose sum over orders never leaves the registers. In 16 bits that moves 6 bytes
for each position and channel, and the carries 3 for each order. A column order needs no transpose: the channels of a
position are contiguous.

1. `orders_carry_kernel` finds what each chunk contributes at its end and how much it lets through. Both follow from
   running sums of the step size, as the decay of a stretch is the exponential of its sum.
2. `combine_kernel` of `scan_states` combines these in the sequence of each order.
3. `orders_scan_kernel` goes through every chunk again from its right start.

Backward computes the states again, and takes one order after the other: the gradients of dt, B and C are sums over
channels, whose parts are in memory for one order at a time. The step size is a matrix product of any rank. Sums leave
each program as partial sums in places of their own: no atomics, the same bits in every run. Element offsets are 64-bit
from tile to tile, and 32-bit inside of one. The block sizes are the fastest that spill no registers, of six forward and
eight backward that were tried on an H200.
"""

import torch
import triton
import triton.language as tl

from ..library import REFERENCES
from ..partial_sums import add_partial_sums
from ..scan_states.triton_kernels import (
    COMBINE_BLOCK,
    LOG2_E,
    PRECISION,
    _compose,
    _softplus,
    _softplus_slope,
    combine_kernel,
)
from ..triton_backend import launch, register
from .orders import INTEGERS, ORDERS, split
from .reference import selective_scan_backward_reference, selective_scan_reference

FORWARD = (8, 16, 2)
"""Rows and columns of a tile, channels of a program and its warps; of larger tiles the carries are fewer."""
BACKWARD = (4, 16, 1)
"""The same in backward, which holds twice as much of each position: with tiles of 8 float32 would spill registers."""
NUM_STAGES = 2
"""Of the loop over components of dt; with three, the compiler's default, backward in float32 spills two registers."""
BLOCK_R = 16
"""Components of dt in a product: the fewest that tensor cores take."""
ALONG = ('columns', 'columns_backwards', 'rows', 'rows_backwards')
"""The orders of the kernels: the axis of a tile that they go along is the index halved, the direction its parity."""


@triton.jit
def _locate(H, W, blocks, TILE: tl.constexpr):
    """Returns image, tile among those of all images, its row and column of tiles, and the block of channels.

    Channel blocks come first in launch order: neighbours run at the same time and share what they load per position.
    """
    pid = tl.program_id(0)
    tile = pid // blocks
    across = tl.cdiv(W, TILE)
    down = tl.cdiv(H, TILE)
    return (tile // across // down).to(tl.int64), tile, tile // across % down, tile % across, pid % blocks


@triton.jit
def _positions(n, row, column, H, W, TILE: tl.constexpr):
    """Returns a tile's first position among those of all images, the others counted from it, row by row, and which of
    them exist."""
    first = (n * H + row * TILE) * W + column * TILE
    p = tl.arange(0, TILE * TILE)
    exists = (row * TILE + p // TILE < H) & (column * TILE + p % TILE < W)
    return first, p // TILE * W + p % TILE, exists


@triton.jit
def _chunks(n, row, column, H, W, CODE: tl.constexpr, TILE: tl.constexpr):
    """Returns the places of a tile's chunks among those of the image and all before it, which of them exist, and the
    number of them in an image."""
    if CODE // 2 == 1:
        line = row * TILE + tl.arange(0, TILE)
        lines, chunks, chunk = H, tl.cdiv(W, TILE), column
    else:
        line = column * TILE + tl.arange(0, TILE)
        lines, chunks, chunk = W, tl.cdiv(H, TILE), row
    return (n * lines + line) * chunks + chunk, line < lines, lines.to(tl.int64) * chunks


@triton.jit
def _load_map(ptr, t, e, inside, E):
    """Loads a map (L, E) at positions t (rows) and channels e (columns) as float32, 0 outside."""
    offset = t[:, None] * E + e[None, :]
    return tl.load(ptr + offset, mask=inside[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_weights(ptr, t, inside, stride):
    """Loads a value of each position as float32, 0 outside."""
    return tl.load(ptr + t * stride, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_low_rank(dt_ptr, t, inside, r, stride, rank):
    """Loads dt at positions t (rows), for components r (columns), as float32, 0 outside."""
    mask = inside[:, None] & (r < rank)[None, :]
    return tl.load(dt_ptr + t[:, None] * stride + r[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_projection(weight_ptr, r, e, E, rank):
    """Loads the transposed dt_weight (rank, E) of an order for components r (rows) and channels e (columns)."""
    return tl.load(weight_ptr + r[:, None] * E + e[None, :], mask=(r < rank)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _load_channels(ptr, e, E):
    return tl.load(ptr + e, mask=e < E, other=0.0)[None, :]


@triton.jit
def _step_sizes(
    dt_ptr, weight_ptr, bias_ptr, t, inside, e, E, stride, rank, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes the step sizes of a tile, 0 outside, where they leave the state as it is."""
    pre = tl.zeros((t.shape[0], e.shape[0]), tl.float32) + _load_channels(bias_ptr, e, E)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        dt = _load_low_rank(dt_ptr, t, inside, r, stride, rank)
        pre = tl.dot(dt, _load_projection(weight_ptr, r, e, E, rank), pre, input_precision=PRECISION)
    return tl.where(inside[:, None], _softplus(pre), 0.0)


@triton.jit
def _as_grid(x, TILE: tl.constexpr):
    return tl.reshape(x, (TILE, TILE, x.shape[1]))


@triton.jit
def _scan(a, b, start, CODE: tl.constexpr, TILE: tl.constexpr):
    """Computes ``h = a h_before + b`` along an order, from the starts of the tile's chunks, (TILE, channels)."""
    grid = (_as_grid(a, TILE), _as_grid(b, TILE))
    decay, h = tl.associative_scan(grid, CODE // 2, _compose, reverse=CODE % 2 == 1)
    return tl.reshape(h + decay * tl.expand_dims(start, CODE // 2), a.shape)


@triton.jit
def _precede(a1, passed1, lambda1, a2, passed2, lambda2):
    """Puts a stretch (2) before one that follows it in the order (1): its first decay, the product of the others, and
    the adjoint of its first state."""
    passed = passed2 * a1
    return a2, passed * passed1, lambda2 + passed * lambda1


@triton.jit
def _adjoint(a, dh, start, CODE: tl.constexpr, TILE: tl.constexpr):
    """Computes ``lambda = dh + (a lambda)_behind`` against the direction of an order; ``start`` is what enters."""
    grid = (_as_grid(a, TILE), tl.full((TILE, TILE, a.shape[1]), 1.0, tl.float32), _as_grid(dh, TILE))
    _, passed, adjoint = tl.associative_scan(grid, CODE // 2, _precede, reverse=CODE % 2 == 0)
    return tl.reshape(adjoint + passed * tl.expand_dims(start, CODE // 2), a.shape)


@triton.jit
def _ways(delta, CODE: tl.constexpr, ADJOINT: tl.constexpr, TILE: tl.constexpr):
    """Returns the step sizes between each position of a tile and the end of its chunk, summed, and those of all of it.

    The end is the last position in the direction of the order, which the state has reached; of the adjoint it is the
    first, which the adjoint has left again.
    """
    steps = _as_grid(delta, TILE)
    total = tl.sum(steps, CODE // 2, keep_dims=True)
    if ADJOINT:
        return tl.cumsum(steps, CODE // 2, reverse=CODE % 2 == 1), total
    so_far = tl.cumsum(steps, CODE // 2)
    return total - so_far if CODE % 2 == 0 else so_far - steps, total


@triton.jit(do_not_specialize=['N', 'H', 'W', 'rank', 'states', 'stride_dn', 'stride_Bn', 'orders_apart'])
def orders_carry_kernel(
    x_ptr, dt_ptr, B_ptr, weight_ptr, bias_ptr, A_ptr, end_ptr, decay_ptr, N, H, W, E, rank, states,
    orders_apart, stride_dn, stride_dt, stride_dk, stride_Bn, stride_Bt, stride_Bk,
    CODES: tl.constexpr, BLOCK_R: tl.constexpr, ADJOINT: tl.constexpr,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes, for every order, what each chunk of a tile contributes at its end and the factor that it puts on its
    start.

    Grid: images x tiles x channel blocks. Reads x (u and B, or dy and C if ADJOINT) and dt of its tile; writes end and
    decay, (states, N, chunks, E) for each order. With ADJOINT, of the adjoint, whose end is ``a lambda`` at the first
    position of a chunk.
    """
    n, _, row, column, block = _locate(H, W, tl.cdiv(E, BLOCK_E), TILE)
    first, t, inside = _positions(n, row, column, H, W, TILE)
    at = first - n * H * W
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    dt_ptr += n * stride_dn + at * stride_dt
    B_ptr += n * stride_Bn + at * stride_Bt
    for k in tl.static_range(len(CODES)):
        delta = _step_sizes(
            dt_ptr + k * stride_dk, weight_ptr + k * rank * E, bias_ptr + k * E, t,
            inside, e, E, stride_dt, rank, BLOCK_R,
        )  # fmt: skip
        way, total = _ways(delta, CODES[k], ADJOINT, TILE)
        place, exists, chunks = _chunks(n, row, column, H, W, CODES[k], TILE)
        for s in range(states):
            rate = _load_channels(A_ptr + (k * states + s) * E, e, E) * LOG2_E
            b = _load_map(x_ptr + first * E, t, e, inside, E)
            b *= _load_weights(B_ptr + k * stride_Bk + s, t, inside, stride_Bt)
            if not ADJOINT:
                b *= delta
            end = tl.sum(_as_grid(b, TILE) * tl.exp2(way * rate[None, :, :]), CODES[k] // 2)
            decay = tl.exp2(tl.reshape(total, (TILE, BLOCK_E)) * rate)
            offset = k * orders_apart + (place + s * N * chunks)[:, None] * E + e[None, :]
            mask = exists[:, None] & (e < E)[None, :]
            tl.store(end_ptr + offset, end, mask=mask)
            tl.store(decay_ptr + offset, decay, mask=mask)


@triton.jit
def _load_start(ptr, n, row, column, s, N, H, W, e, E, CODE: tl.constexpr, TILE: tl.constexpr):
    """Loads what enters the chunks of a tile, (TILE, channels), from (states, N, chunks, E)."""
    place, exists, chunks = _chunks(n, row, column, H, W, CODE, TILE)
    offset = (place + s * N * chunks)[:, None] * E + e[None, :]
    return tl.load(ptr + offset, mask=exists[:, None] & (e < E)[None, :], other=0.0)


@triton.jit(do_not_specialize=['N', 'H', 'W', 'rank', 'states', 'stride_dn', 'stride_Bn', 'stride_Cn', 'orders_apart'])
def orders_scan_kernel(
    u_ptr, dt_ptr, B_ptr, C_ptr, weight_ptr, bias_ptr, A_ptr, D_ptr, start_ptr, y_ptr, N, H, W, E, rank, states,
    orders_apart, stride_dn, stride_dt, stride_dk, stride_Bn, stride_Bt, stride_Bk, stride_Cn, stride_Ct, stride_Ck,
    CODES: tl.constexpr, BLOCK_R: tl.constexpr,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes y of one tile from the starts of its chunks in every order.

    Grid: images x tiles x channel blocks. Reads u, dt, B and C of its tile and its starts; writes y.
    """
    n, _, row, column, block = _locate(H, W, tl.cdiv(E, BLOCK_E), TILE)
    first, t, inside = _positions(n, row, column, H, W, TILE)
    at = first - n * H * W
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    dt_ptr += n * stride_dn + at * stride_dt
    B_ptr += n * stride_Bn + at * stride_Bt
    C_ptr += n * stride_Cn + at * stride_Ct
    u = _load_map(u_ptr + first * E, t, e, inside, E)
    y = u * _load_channels(D_ptr, e, E)
    for k in tl.static_range(len(CODES)):
        delta = _step_sizes(
            dt_ptr + k * stride_dk, weight_ptr + k * rank * E, bias_ptr + k * E, t,
            inside, e, E, stride_dt, rank, BLOCK_R,
        )  # fmt: skip
        for s in range(states):
            rate = _load_channels(A_ptr + (k * states + s) * E, e, E) * LOG2_E
            b = delta * u * _load_weights(B_ptr + k * stride_Bk + s, t, inside, stride_Bt)
            start = _load_start(start_ptr + k * orders_apart, n, row, column, s, N, H, W, e, E, CODES[k], TILE)
            h = _scan(tl.exp2(delta * rate), b, start, CODES[k], TILE)
            y += h * _load_weights(C_ptr + k * stride_Ck + s, t, inside, stride_Ct)
    offset = t[:, None] * E + e[None, :]
    mask = inside[:, None] & (e < E)[None, :]
    tl.store(y_ptr + first * E + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['N', 'H', 'W', 'rank', 'stride_dn', 'stride_Bn', 'stride_Cn'])
def orders_backward_kernel(
    dy_ptr, u_ptr, dt_ptr, B_ptr, C_ptr, weight_ptr, bias_ptr, A_ptr, D_ptr, start_ptr, adjoint_ptr, sum_ptr, du_ptr,
    tokens_ptr, channels_ptr, N, H, W, E, rank, states, stride_dn, stride_dt, stride_Bn, stride_Bt, stride_Cn,
    stride_Ct, CODE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes what one order adds to the gradients of one tile, from what enters its chunks at both ends.

    Grid: images x tiles x channel blocks. Reads dy, u, dt, B and C of its tile, states and adjoints at the borders of
    its chunks and, unless FIRST, the sum of du so far; writes that sum or, if LAST, du. Writes partial sums: over its
    channels of ddt, dB and dC, (channel blocks, N, H, W, rank + 2 states); over its positions of dA, dt_bias, D (0
    unless FIRST) and dt_weight, transposed, (N, tiles, states + 2 + rank, E).
    """
    n, tile, row, column, block = _locate(H, W, tl.cdiv(E, BLOCK_E), TILE)
    first, t, inside = _positions(n, row, column, H, W, TILE)
    at = first - n * H * W
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    dt_ptr += n * stride_dn + at * stride_dt
    B_ptr += n * stride_Bn + at * stride_Bt
    C_ptr += n * stride_Cn + at * stride_Ct
    tokens_ptr += ((block.to(tl.int64) * N * H * W + first) + t) * (rank + 2 * states)
    channels_ptr += tile.to(tl.int64) * (states + 2 + rank) * E + e

    delta = _step_sizes(dt_ptr, weight_ptr, bias_ptr, t, inside, e, E, stride_dt, rank, BLOCK_R)
    u = _load_map(u_ptr + first * E, t, e, inside, E)
    dy = _load_map(dy_ptr + first * E, t, e, inside, E)
    if FIRST:
        du = dy * _load_channels(D_ptr, e, E)
        dD = tl.sum(dy * u, 0)
    else:
        du = _load_map(sum_ptr + first * E, t, e, inside, E)
        dD = tl.zeros((BLOCK_E,), tl.float32)
    tl.store(channels_ptr + (states + 1) * E, dD, mask=e < E)
    ddelta = tl.zeros((TILE * TILE, BLOCK_E), tl.float32)
    for s in range(states):
        A = _load_channels(A_ptr + s * E, e, E)
        B = _load_weights(B_ptr + s, t, inside, stride_Bt)
        a = tl.exp2(delta * (A * LOG2_E))
        b = delta * u * B
        h = _scan(a, b, _load_start(start_ptr, n, row, column, s, N, H, W, e, E, CODE, TILE), CODE, TILE)
        tl.store(tokens_ptr + rank + states + s, tl.sum(dy * h, 1), mask=inside)
        decayed = h - b
        adjoint = _adjoint(
            a, dy * _load_weights(C_ptr + s, t, inside, stride_Ct),
            _load_start(adjoint_ptr, n, row, column, s, N, H, W, e, E, CODE, TILE), CODE, TILE,
        )  # fmt: skip
        ddelta += adjoint * (A * decayed + B * u)
        along = adjoint * delta
        du += along * B
        tl.store(tokens_ptr + rank + s, tl.sum(along * u, 1), mask=inside)
        tl.store(channels_ptr + s * E, tl.sum(along * decayed, 0), mask=e < E)
    offset = t[:, None] * E + e[None, :]
    mask = inside[:, None] & (e < E)[None, :]
    if LAST:
        tl.store(du_ptr + first * E + offset, du.to(du_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sum_ptr + first * E + offset, du, mask=mask)

    dpre = ddelta * _softplus_slope(delta)
    tl.store(channels_ptr + states * E, tl.sum(dpre, 0), mask=e < E)
    for first_r in range(0, rank, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        weight = _load_projection(weight_ptr, r, e, E, rank)
        ddt = tl.dot(dpre, tl.trans(weight), input_precision=PRECISION)
        tl.store(tokens_ptr[:, None] + r[None, :], ddt, mask=inside[:, None] & (r < rank)[None, :])
        dt = _load_low_rank(dt_ptr, t, inside, r, stride_dt, rank)
        dweight = tl.dot(tl.trans(dt), dpre, input_precision=PRECISION)
        rows = (states + 2 + r)[:, None] * E
        tl.store(channels_ptr[None, :] + rows, dweight, mask=(r < rank)[:, None] & (e < E)[None, :])


def _by_position(x: torch.Tensor) -> torch.Tensor:
    """Returns a map (N, H, W, K, ·) as (N, L, K, ·) with contiguous values. Slices of a packed tensor stay views."""
    x = x.flatten(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class OrderedScan:
    """The launches of one scan in several orders: what is shared by its kernels, forward and backward.

    Args:
        block: Size of a tile, channels of a program and its warps.
        codes: Index of each order in `ALONG`.
        u: Input, contiguous, (N, H, W, E).
        dt, B, C: Any strides, (N, H, W, K, ·).
        dt_weight, dt_bias, A, D: The parameters, float32.
    """

    def __init__(self, block, codes, u, dt, B, C, dt_weight, dt_bias, A, D):
        self.codes, self.u = codes, u
        self.N, self.H, self.W, self.E = u.shape
        self.K, self.S = A.shape[0], A.shape[2]
        self.dt, self.B, self.C = (_by_position(x) for x in (dt, B, C))
        self.R = dt.shape[-1]
        self.weight, self.A = (x.transpose(1, 2).contiguous() for x in (dt_weight, A))
        self.bias, self.D = dt_bias.contiguous(), D.sum(0)
        self.sizes = (self.N, self.H, self.W, self.E, self.R, self.S)
        tile, channels, warps = block
        self.across, self.down = triton.cdiv(self.W, tile), triton.cdiv(self.H, tile)
        self.tiles = self.N * self.across * self.down
        self.blocks = triton.cdiv(self.E, channels)
        self.constants = {
            'BLOCK_R': BLOCK_R, 'TILE': tile, 'BLOCK_E': channels, 'num_warps': warps, 'num_stages': NUM_STAGES,
        }  # fmt: skip

    def outputs(self) -> torch.Tensor:
        """Returns y, contiguous, shape and dtype of u."""
        y = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device)
        start = self._starts(self.u, self.B, False)
        launch(
            orders_scan_kernel, self.tiles * self.blocks, self.u, self.dt, self.B, self.C, self.weight, self.bias,
            self.A, self.D, start, y, *self.sizes, start.stride(0), *self.dt.stride()[:3], *self.B.stride()[:3],
            *self.C.stride()[:3], CODES=self.codes, **self.constants,
        )  # fmt: skip
        return y

    def gradients(self, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the gradients of u, dt, B, C, dt_weight, dt_bias, A and D; dy is contiguous."""
        R, S, dtype = self.R, self.S, self.u.dtype
        start, adjoint = self._starts(self.u, self.B, False), self._starts(dy, self.C, True)
        du = torch.empty(self.u.shape, dtype=dtype, device=self.u.device)
        so_far = self._empty(*self.u.shape) if self.K > 1 else self.D  # not touched by a single order
        part = self._empty(self.blocks, *self.u.shape[:3], R + 2 * S)
        sums = self._empty(self.tiles, S + 2 + R, self.E)
        tokens, channels = [], []
        for k, code in enumerate(self.codes):
            dt, B, C = (x[:, :, k] for x in (self.dt, self.B, self.C))
            launch(
                orders_backward_kernel, self.tiles * self.blocks, dy, self.u, dt, B, C, self.weight[k], self.bias[k],
                self.A[k], self.D, start[k], adjoint[k], so_far, du, part, sums, *self.sizes, *dt.stride()[:2],
                *B.stride()[:2], *C.stride()[:2], CODE=code, FIRST=k == 0, LAST=k == self.K - 1, **self.constants,
            )  # fmt: skip
            of_tokens, of_channels = add_partial_sums((part, dtype), (sums, torch.float32))
            tokens.append(of_tokens.split((R, S, S), -1))
            channels.append(of_channels)
        ddt, dB, dC = (torch.stack(x, 3) for x in zip(*tokens))
        channels = torch.stack(channels)
        dA, dweight = (channels[:, rows].transpose(1, 2) for rows in (slice(S), slice(S + 2, None)))
        dD = channels[0, S + 1].expand(self.K, self.E)
        # Copies, also of a single order, whose slices are contiguous: outputs of an op share no memory.
        copies = (x.clone(memory_format=torch.contiguous_format) for x in (dweight, channels[:, S], dA, dD))
        return du, ddt, dB, dC, *copies

    def _starts(self, x: torch.Tensor, weights: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """Returns what enters each chunk, for each order: (STATES, N, chunks, E), at the head of a row."""
        chunks = [self.H * self.across if ALONG[code].startswith('rows') else self.W * self.down for code in self.codes]
        end, decay, start = (self._empty(self.K, self.S * self.N * max(chunks) * self.E) for _ in range(3))
        launch(
            orders_carry_kernel, self.tiles * self.blocks, x, self.dt, weights, self.weight, self.bias, self.A, end,
            decay, *self.sizes, end.stride(0), *self.dt.stride()[:3], *weights.stride()[:3], CODES=self.codes,
            ADJOINT=adjoint, **self.constants,
        )  # fmt: skip
        at_a_time, channels = COMBINE_BLOCK
        for k, code in enumerate(self.codes):
            launch(
                combine_kernel, self.S * self.N * triton.cdiv(self.E, channels), end[k], decay[k], start[k], chunks[k],
                self.E, ADJOINT=adjoint != (code % 2 == 1), BLOCK_CHUNKS=at_a_time, BLOCK_E=channels, num_warps=4,
            )  # fmt: skip
        return start

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)


def _codes(u, dt, B, C, A, orders: list[int]) -> tuple[int, ...] | None:
    """Returns the index of each order in `ALONG`, or None if the kernels do not serve one of them, or maps so wide that
    a tile spans 2^31 elements."""
    known = [ORDERS[name](*u.shape[1:3]) for name in ALONG]
    served = [order for order in split(orders) if order in known]
    span = FORWARD[0] * u.shape[2] * max(u.shape[3], *(x.stride(2) for x in (dt, B, C)))
    if len(orders) != INTEGERS * len(A) or len(served) != len(A) or not served or span >= 2**31:
        return None
    return tuple(known.index(order) for order in served)


def selective_scan(u, dt, B, C, dt_weight, dt_bias, A, D, orders) -> torch.Tensor:
    """Computes the op `selective_scan`; the reference serves snakes, and other orders that are not in `ALONG`."""
    codes = _codes(u, dt, B, C, A, orders)
    if codes is None:
        return REFERENCES['selective_scan.orders'](u, dt, B, C, dt_weight, dt_bias, A, D, orders)
    return OrderedScan(FORWARD, codes, u.contiguous(), dt, B, C, dt_weight, dt_bias, A, D).outputs()


def selective_scan_backward(dy, u, dt, B, C, dt_weight, dt_bias, A, D, orders) -> tuple[torch.Tensor, ...]:
    """Computes the op `selective_scan_backward`, from the inputs alone."""
    codes = _codes(u, dt, B, C, A, orders)
    if codes is None:
        return REFERENCES['selective_scan_backward.orders'](dy, u, dt, B, C, dt_weight, dt_bias, A, D, orders)
    scan = OrderedScan(BACKWARD, codes, u.contiguous(), dt, B, C, dt_weight, dt_bias, A, D)
    return scan.gradients(dy.contiguous())


register('selective_scan.orders', selective_scan, selective_scan_reference)
register('selective_scan_backward.orders', selective_scan_backward, selective_scan_backward_reference)
