"""Triton kernels of the selective scan, forward and backward, with the step size given or computed on the fly.

The sequence is cut into chunks. One kernel finds what each chunk contributes at its end and how much it lets through;
a small one combines these carries in order; a third goes through every chunk again from its right start. Inside a
chunk a program walks over tiles of ``BLOCK_L`` tokens and ``BLOCK_E`` channels. The tokens of a tile are scanned in
parallel, since a loop over single tokens would wait for memory at each, and channels are the contiguous dimension, so
that loads are coalesced.

All arithmetic is float32. Sums over channels or tokens leave each program as a partial sum in a place of its own and
are added in a fixed order afterwards: no atomics, the same bits in every run. Element offsets are 64-bit; the number of
tokens in one image must be below 2^30. Block sizes and warps were chosen from what the compiler reports (at most 24
bytes a thread are spilled, at rank 48): none is measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

from ..triton_backend import register, uniform_tokens
from .reference import scan_states_backward_reference, scan_states_reference

BLOCK_L = 32
"""Tokens of a tile."""
BLOCK_E = 32
"""Channels of a tile: 128 bytes of float32, 64 of a 16-bit dtype."""
BLOCK_CHUNKS = 32
"""Chunks that the combining kernel takes at a time."""
NUM_WARPS = 4
NUM_WARPS_BACKWARD = 8
"""For the backward kernel when the rank is above ``DOT_RANK``: its products would spill with fewer threads."""
TARGET_PROGRAMS = 2048
"""Programs that are enough to fill a GPU; beyond, chunks grow, so that their carries stay few and cheap to combine."""
DOT_RANK = 16
"""Rank from which the step size is a matrix product on tensor cores: 16 is the smallest they take."""


@triton.jit
def _locate(L, E, tiles, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns image, chunk, channel block and channels of this program.

    Channel blocks come first in launch order: neighbours run at the same time and share what they load per token.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    chunks = tl.cdiv(L, tiles * BLOCK_L)
    block = pid % blocks
    n = (pid // blocks // chunks).to(tl.int64)
    return n, pid // blocks % chunks, block, block * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def _load_tile(ptr, n, t, e, L, E):
    """Loads a tile of a contiguous (N, L, E) tensor as float32, 0 outside."""
    offset = (n * L + t)[:, None] * E + e[None, :]
    return tl.load(ptr + offset, mask=(t < L)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, value, n, t, e, L, E):
    """Stores a tile into a contiguous (N, L, E) tensor."""
    offset = (n * L + t)[:, None] * E + e[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(t < L)[:, None] & (e < E)[None, :])


@triton.jit
def _load_tokens(ptr, n, t, L, stride_n, stride_t):
    """Loads one value for each token as float32, 0 outside."""
    return tl.load(ptr + n * stride_n + t.to(tl.int64) * stride_t, mask=t < L, other=0.0).to(tl.float32)


@triton.jit
def _load_low_rank(dt_ptr, n, t, r, L, stride_n, stride_t, RANK: tl.constexpr):
    """Loads dt for tokens t (rows) and components r (columns) as float32, 0 outside."""
    offset = n * stride_n + t.to(tl.int64)[:, None] * stride_t + r[None, :]
    return tl.load(dt_ptr + offset, mask=(t < L)[:, None] & (r < RANK)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_weight(dt_weight_ptr, r, e, E, RANK: tl.constexpr):
    """Loads the transposed dt_weight (RANK, E) for components r (rows) and channels e (columns), 0 outside."""
    return tl.load(dt_weight_ptr + r[:, None] * E + e[None, :], mask=(r < RANK)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _project(
    dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_n, stride_t,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    """Computes ``dt · dt_weight + dt_bias`` for a tile, as the tensor cores' three-pass tf32 (float32's accuracy) or,
    where they would mostly multiply padding, as RANK multiply-adds.
    """
    bias = tl.load(dt_bias_ptr + e, mask=e < E, other=0.0)[None, :]
    if USE_DOT:
        r = tl.arange(0, BLOCK_R)
        dt = _load_low_rank(dt_ptr, n, t, r, L, stride_n, stride_t, RANK)
        weight = _load_weight(dt_weight_ptr, r, e, E, RANK)
        return tl.dot(dt, weight, input_precision='tf32x3') + bias
    pre = tl.zeros((t.shape[0], e.shape[0]), tl.float32) + bias
    for r in tl.static_range(RANK):
        dt = _load_tokens(dt_ptr + r, n, t, L, stride_n, stride_t)
        weight = tl.load(dt_weight_ptr + r * E + e, mask=e < E, other=0.0)
        pre += dt[:, None] * weight[None, :]
    return pre


@triton.jit
def _softplus(x):
    """Computes log(1 + exp(x)) with a relative error near float32's for every x.

    log1p(z) = 2 atanh(s) with s = z / (2 + z), at most 1/3 here: eight terms of the series leave 1.4e-9. log(1 + z)
    itself would lose all digits for the small step sizes.
    """
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def _inside(value, t, e, L, E):
    """Keeps a tile where the tensor is and puts 0 elsewhere: a step size of 0 leaves the state as it is."""
    return tl.where((t < L)[:, None] & (e < E)[None, :], value, 0.0)


@triton.jit
def _step_size(
    dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_n, stride_t,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    """Returns the step size of a tile, 0 outside: loaded if RANK is 0, otherwise computed from the low-rank dt."""
    if RANK == 0:
        return _load_tile(dt_ptr, n, t, e, L, E)
    pre = _project(dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_n, stride_t, RANK, BLOCK_R, USE_DOT)
    return _inside(_softplus(pre), t, e, L, E)


@triton.jit
def _compose(a1, b1, a2, b2):
    """Composes two steps ``h -> a h + b``, the first one first."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_adjoint(a2, p2, q2, a1, p1, q1):
    """Composes two stretches of the adjoint recurrence, the later one (2) first.

    A stretch takes mu = a lambda of the token after it and gives lambda = p mu + q at its first token, whose factor a
    it remembers. With the factor inside, no token needs that of its neighbour.
    """
    return a1, p1 * a2 * p2, p1 * a2 * q2 + q1


@triton.jit
def carry_kernel(
    x_ptr, dt_ptr, B_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, end_ptr, decay_ptr, L, E, tiles,
    stride_dn, stride_dt, stride_Bn, stride_Bt,
    ADJOINT: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, USE_DOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes what one chunk contributes at its end, started from 0, and the factor that it puts on its start.

    Grid: images x chunks x channel blocks. Reads x (u, or dh if ADJOINT) and the step size of its chunk; writes
    ``BLOCK_E`` values of end and decay, (N, chunks, E) each. ADJOINT walks backwards: its end is mu = a lambda at the
    first token.

    A sum is enough: a token reaches the end with the exponential of the sum of the step sizes on its way. Rows of a
    tile are in the order that the way sees last to first.
    """
    n, chunk, _, e = _locate(L, E, tiles, BLOCK_L, BLOCK_E)
    A = tl.load(A_ptr + e, mask=e < E, other=0.0)
    end = tl.zeros((BLOCK_E,), tl.float32)
    duration = tl.zeros((BLOCK_E,), tl.float32)
    row = tl.arange(0, BLOCK_L)
    for i in range(tiles):
        t = (chunk * tiles + (tiles - 1 - i if ADJOINT else i)) * BLOCK_L + (row if ADJOINT else BLOCK_L - 1 - row)
        x = _load_tile(x_ptr, n, t, e, L, E)
        delta = _step_size(
            dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_dn, stride_dt, RANK, BLOCK_R, USE_DOT
        )
        if ADJOINT:
            remaining = tl.cumsum(delta, 0)
        else:
            x = x * delta * _load_tokens(B_ptr, n, t, L, stride_Bn, stride_Bt)[:, None]
            remaining = tl.cumsum(delta, 0) - delta
        tile_duration = tl.sum(delta, 0)
        end = end * tl.exp(A * tile_duration) + tl.sum(x * tl.exp(A[None, :] * remaining), 0)
        duration += tile_duration
    offset = (n * tl.cdiv(L, tiles * BLOCK_L) + chunk) * E + e
    tl.store(end_ptr + offset, end, mask=e < E)
    tl.store(decay_ptr + offset, tl.exp(A * duration), mask=e < E)


@triton.jit
def combine_kernel(
    end_ptr, decay_ptr, start_ptr, chunks, E, ADJOINT: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Combines the carries of all chunks in order (from the last to the first if ADJOINT) into the start of each.

    Grid: images x channel blocks. Reads end and decay, writes start, (N, chunks, E) each.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    n = (pid // blocks).to(tl.int64)
    e = (pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    row = tl.arange(0, BLOCK_CHUNKS)[:, None]
    start = tl.zeros((1, BLOCK_E), tl.float32)
    first = n * chunks + (chunks - 1 if ADJOINT else 0)
    tl.store(start_ptr + first * E + e, start, mask=e < E)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        position = begin + row
        chunk = n * chunks + (chunks - 1 - position if ADJOINT else position)
        mask = (position < chunks) & (e < E)
        decay = tl.load(decay_ptr + chunk * E + e, mask=mask, other=1.0)
        end = tl.load(end_ptr + chunk * E + e, mask=mask, other=0.0)
        decay, end = tl.associative_scan((decay, end), 0, _compose)
        end += decay * start
        following = chunk - 1 if ADJOINT else chunk + 1
        tl.store(start_ptr + following * E + e, end, mask=(position + 1 < chunks) & (e < E))
        start = tl.sum(tl.where(row == BLOCK_CHUNKS - 1, end, 0.0), 0, keep_dims=True)


@triton.jit
def scan_kernel(
    u_ptr, dt_ptr, B_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, start_ptr, h_ptr, L, E, tiles,
    stride_dn, stride_dt, stride_Bn, stride_Bt,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, USE_DOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the state of one chunk from its start.

    Grid: images x chunks x channel blocks. Reads u and the step size of its chunk, ``BLOCK_E`` values of start
    (N, chunks, E); writes h of its chunk.
    """
    n, chunk, _, e = _locate(L, E, tiles, BLOCK_L, BLOCK_E)
    A = tl.load(A_ptr + e, mask=e < E, other=0.0)
    row = tl.arange(0, BLOCK_L)
    state = tl.load(start_ptr + (n * tl.cdiv(L, tiles * BLOCK_L) + chunk) * E + e, mask=e < E, other=0.0)
    for i in range(tiles):
        t = (chunk * tiles + i) * BLOCK_L + row
        u = _load_tile(u_ptr, n, t, e, L, E)
        delta = _step_size(
            dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_dn, stride_dt, RANK, BLOCK_R, USE_DOT
        )
        B = _load_tokens(B_ptr, n, t, L, stride_Bn, stride_Bt)[:, None]
        decay, h = tl.associative_scan((tl.exp(delta * A[None, :]), delta * B * u), 0, _compose)
        h += decay * state[None, :]
        _store_tile(h_ptr, h, n, t, e, L, E)
        state = tl.sum(tl.where((row == BLOCK_L - 1)[:, None], h, 0.0), 0)


@triton.jit
def scan_backward_kernel(
    dh_ptr, h_ptr, u_ptr, dt_ptr, B_ptr, dy_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, D_ptr, start_ptr,
    du_ptr, ddt_ptr, dB_ptr, ddt_weight_ptr, ddt_bias_ptr, dA_ptr, dD_ptr, N, L, E, tiles,
    stride_dn, stride_dt, stride_Bn, stride_Bt,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, USE_DOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one chunk from the adjoint that enters at its end, walking backwards.

    Tiles hold the tokens from the last to the first: a scan along their rows is the backward one.

    Grid: images x chunks x channel blocks. Reads dh, h, u, (with RANK) dy and the step size of its chunk. Writes du
    and, if RANK is 0, ddt as the gradient of the given step size; partial sums over its channels of dB (channel
    blocks, N, L) and, with RANK, ddt (channel blocks, N, L, RANK); partial sums over its tokens of dA and, with RANK,
    dD, ddt_bias (N, chunks, E) and ddt_weight (N, chunks, E, RANK).
    """
    n, chunk, block, e = _locate(L, E, tiles, BLOCK_L, BLOCK_E)
    A = tl.load(A_ptr + e, mask=e < E, other=0.0)
    row = tl.arange(0, BLOCK_L)
    place = (n * tl.cdiv(L, tiles * BLOCK_L) + chunk) * E + e
    mu = tl.load(start_ptr + place, mask=e < E, other=0.0)
    dA = tl.zeros((BLOCK_E,), tl.float32)
    if RANK > 0:
        D = tl.load(D_ptr + e, mask=e < E, other=0.0)
        dD = tl.zeros((BLOCK_E,), tl.float32)
        dbias = tl.zeros((BLOCK_E,), tl.float32)
        r = tl.arange(0, BLOCK_R)
        dweight = tl.zeros((BLOCK_E, BLOCK_R), tl.float32)
    for i in range(tiles):
        t = (chunk * tiles + tiles - i) * BLOCK_L - 1 - row
        if RANK == 0:
            delta = _load_tile(dt_ptr, n, t, e, L, E)
        else:
            pre = _project(
                dt_ptr, dt_weight_ptr, dt_bias_ptr, n, t, e, L, E, stride_dn, stride_dt, RANK, BLOCK_R, USE_DOT
            )
            delta = _inside(_softplus(pre), t, e, L, E)
        a = tl.exp(delta * A[None, :])
        dh = _load_tile(dh_ptr, n, t, e, L, E)
        _, through, adjoint = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), dh), 0, _compose_adjoint)
        adjoint += through * mu[None, :]
        mu_tile = adjoint * a
        mu = tl.sum(tl.where((row == BLOCK_L - 1)[:, None], mu_tile, 0.0), 0)

        u = _load_tile(u_ptr, n, t, e, L, E)
        B = _load_tokens(B_ptr, n, t, L, stride_Bn, stride_Bt)[:, None]
        previous = (n * L + t - 1)[:, None] * E + e[None, :]
        mask = ((t > 0) & (t < L))[:, None] & (e < E)[None, :]
        dexponent = mu_tile * tl.load(h_ptr + previous, mask=mask, other=0.0)
        dA += tl.sum(dexponent * delta, 0)
        ddelta = dexponent * A[None, :] + adjoint * B * u
        dinput = adjoint * delta
        tl.store(dB_ptr + (block.to(tl.int64) * N + n) * L + t, tl.sum(dinput * u, 1), mask=t < L)
        du = dinput * B
        if RANK == 0:
            _store_tile(ddt_ptr, ddelta, n, t, e, L, E)
        else:
            dy = _load_tile(dy_ptr, n, t, e, L, E)
            du += dy * D[None, :]
            dD += tl.sum(dy * u, 0)
            dpre = _inside(ddelta * tl.sigmoid(pre), t, e, L, E)
            dbias += tl.sum(dpre, 0)
            weight = _load_weight(dt_weight_ptr, r, e, E, RANK)
            ddt = tl.dot(dpre, tl.trans(weight), input_precision='tf32x3')
            ddt_rows = ((block.to(tl.int64) * N + n) * L + t)[:, None] * RANK
            tl.store(ddt_ptr + ddt_rows + r[None, :], ddt, mask=(t < L)[:, None] & (r < RANK)[None, :])
            dt = _load_low_rank(dt_ptr, n, t, r, L, stride_dn, stride_dt, RANK)
            dweight += tl.dot(tl.trans(dpre), dt, input_precision='tf32x3')
        _store_tile(du_ptr, du, n, t, e, L, E)
    tl.store(dA_ptr + place, dA, mask=e < E)
    if RANK > 0:
        tl.store(dD_ptr + place, dD, mask=e < E)
        tl.store(ddt_bias_ptr + place, dbias, mask=e < E)
        tl.store(
            ddt_weight_ptr + place[:, None] * RANK + r[None, :], dweight, mask=(e < E)[:, None] & (r < RANK)[None, :]
        )


class Scan:
    """The launches of one scan: what is shared by its kernels, forward and backward.

    Args:
        u: Input, contiguous, (N, L, E) or (N, H, W, E).
        dt: Step size, contiguous, shape of ``u``; or low-rank step size, any strides, if ``dt_weight`` is given.
        B: Input weight of each token, any strides.
        A: Decay rate, (E,), float32.
        dt_weight: Projection of the low-rank step size, (E, R), float32.
        dt_bias: Bias of the projection, (E,), float32.
    """

    def __init__(self, u, dt, B, A, dt_weight=None, dt_bias=None):
        self.u = u
        self.N, self.E = u.shape[0], u.shape[-1]
        self.L = u.shape[1:-1].numel()
        self.dt, self.B = uniform_tokens(dt), uniform_tokens(B)
        self.A = A.contiguous()
        # The kernels do not touch the projection without a rank; a pointer has to be there all the same.
        self.dt_weight = self.A if dt_weight is None else dt_weight.t().contiguous()
        self.dt_bias = self.A if dt_bias is None else dt_bias.contiguous()
        self.rank = 0 if dt_weight is None else dt_weight.shape[1]

        self.blocks = triton.cdiv(self.E, BLOCK_E)
        tiles = triton.cdiv(self.L, BLOCK_L)
        self.tiles = min(tiles, max(1, self.N * self.blocks * tiles // TARGET_PROGRAMS))
        self.chunks = triton.cdiv(tiles, self.tiles)
        self.grid = (self.N * self.chunks * self.blocks,)
        self.strides = (self.dt.stride(0), self.dt.stride(1), self.B.stride(0), self.B.stride(1))
        self.constants = {
            'RANK': self.rank,
            'BLOCK_R': max(DOT_RANK, triton.next_power_of_2(self.rank)),
            'USE_DOT': self.rank >= DOT_RANK,
            'BLOCK_L': BLOCK_L,
            'BLOCK_E': BLOCK_E,
        }

    def states(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the states h in the given dtype, contiguous, shape of u."""
        h = torch.empty(self.u.shape, dtype=dtype, device=self.u.device)
        scan_kernel[self.grid](
            self.u, self.dt, self.B, self.dt_weight, self.dt_bias, self.A, self._starts(self.u, False), h,
            self.L, self.E, self.tiles, *self.strides, **self.constants, num_warps=NUM_WARPS,
        )  # fmt: skip
        return h

    def gradients(self, dh: torch.Tensor, h: torch.Tensor, dy=None, D=None) -> tuple[torch.Tensor, ...]:
        """Returns du, ddt, dB, dA and, if the step size is computed here, ddt_weight, ddt_bias and dD.

        Args:
            dh: Gradient of the states, contiguous.
            h: The states in float32.
            dy: Gradient of the observation, for its skip D u; only if the step size is computed here.
            D: Skip weight; likewise.
        """
        per_chunk = (self.N * self.chunks, self.E)
        du = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device)
        dB = self._empty(self.blocks, self.N, self.L)
        dA = self._empty(*per_chunk)
        if self.rank:
            ddt = self._empty(self.blocks, self.N, self.L, self.rank)
            ddt_weight, ddt_bias, dD = (
                self._empty(*per_chunk, self.rank),
                self._empty(*per_chunk),
                self._empty(*per_chunk),
            )
        else:
            ddt = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device)
            dy, D, ddt_weight, ddt_bias, dD = dh, self.A, dA, dA, dA  # not touched without a rank
        scan_backward_kernel[self.grid](
            dh, h, self.u, self.dt, self.B, dy, self.dt_weight, self.dt_bias, self.A, D, self._starts(dh, True),
            du, ddt, dB, ddt_weight, ddt_bias, dA, dD, self.N, self.L, self.E, self.tiles, *self.strides,
            **self.constants, num_warps=NUM_WARPS_BACKWARD if self.rank > DOT_RANK else NUM_WARPS,
        )  # fmt: skip
        dB = dB.sum(0).to(self.u.dtype)
        if not self.rank:
            return du, ddt, dB, dA.sum(0)
        return du, ddt.sum(0).to(self.u.dtype), dB, dA.sum(0), ddt_weight.sum(0), ddt_bias.sum(0), dD.sum(0)

    def _starts(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """Returns the state (or, from the other end, the adjoint) that enters each chunk, (N, chunks, E)."""
        if self.chunks == 1:
            return torch.zeros(self.N, 1, self.E, dtype=torch.float32, device=x.device)
        end, decay, start = (self._empty(self.N, self.chunks, self.E) for _ in range(3))
        carry_kernel[self.grid](
            x, self.dt, self.B, self.dt_weight, self.dt_bias, self.A, end, decay, self.L, self.E, self.tiles,
            *self.strides, ADJOINT=adjoint, **self.constants, num_warps=NUM_WARPS,
        )  # fmt: skip
        combine_kernel[(self.N * self.blocks,)](
            end, decay, start, self.chunks, self.E, ADJOINT=adjoint, BLOCK_CHUNKS=BLOCK_CHUNKS, BLOCK_E=BLOCK_E,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        return start

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)


def scan_states(u, delta, A, B) -> torch.Tensor:
    """Computes the op `scan_states`."""
    return Scan(u.contiguous(), delta.contiguous(), B, A).states(u.dtype)


def scan_states_backward(dh, u, delta, A, B) -> tuple[torch.Tensor, ...]:
    """Computes the op `scan_states_backward`; the state is computed again and kept in float32 meanwhile."""
    scan = Scan(u.contiguous(), delta.contiguous(), B, A)
    du, ddelta, dB, dA = scan.gradients(dh.contiguous(), scan.states(torch.float32))
    return du, ddelta, dA, dB.unsqueeze(-1)


register('scan_states', scan_states, scan_states_reference)
register('scan_states_backward', scan_states_backward, scan_states_backward_reference)
