"""Triton kernels of the selective scan, forward and backward, with the step size given or computed on the fly.

The sequence is cut into chunks. One kernel finds what each chunk contributes at its end and how much it lets through;
a small one combines these carries in order; a third goes through every chunk again from its right start. Inside a
chunk a thread takes two channels and walks over the tokens one by one: nothing is exchanged between threads, and a
state costs one multiply-add. What bounds such a kernel is the number of instructions, so the loads of several tokens
are issued before the first is used, and channels, strides and the rank are constants of the compiled kernel: addresses
inside of such a group are immediate.

A projection of low rank is computed with the scan. From ``DOT_RANK`` on it is a matrix product on tensor cores, in
kernels of its own, and the scan is that of a given step size.

All arithmetic is float32. Sums over channels or tokens leave each program as a partial sum in a place of its own and
are added in a fixed order afterwards: no atomics, the same bits in every run. Element offsets are 64-bit; the number of
tokens in one image must be below 2^30. Block sizes and warps were chosen from what the compiler reports;
eight others that were tried on an H100 are no more than 2 % faster.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import PartialSum, add_partial_sums
from ..triton_backend import ceil_div, launch, register, uniform_tokens
from .reference import scan_states_backward_reference, scan_states_reference

BLOCK_E = 64
"""Channels of a program of one warp: two for each thread."""
GROUP = 8
"""Tokens whose inputs are loaded before the first of them is used."""
GROUP_BACKWARD = 4
"""The same in the backward kernel, which loads four or five inputs for each token."""
MIN_LENGTH = 16
"""Tokens of a chunk, at least: each chunk costs three values for each channel and the start of a program."""
TARGET_PROGRAMS = 4096
"""Programs that are enough to fill a GPU; beyond, chunks grow, so that their carries stay few and cheap to combine."""
COMBINE_BLOCK = (256, 8)
"""Chunks that the combining kernel takes at a time, and its channels."""
DOT_RANK = 16
"""Rank from which the step size is a matrix product on tensor cores: 16 is the smallest they take."""
DOT_BLOCK = (32, 64)
"""Tokens and channels of a tile of such a product; half the channels above rank 32, or an A100's registers spill."""
DOT_PROGRAMS = 1024
"""Programs that are enough for its backward; beyond, each takes several tiles of tokens: partial sums stay few."""

PRECISION = tl.constexpr('ieee' if torch.version.hip else 'tf32x3')
"""Of matrix products: three passes of tf32 have float32's accuracy; AMD's compiler does not know them."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(L, length, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns image, number of the chunk among those of all images, its first token and how many it has, channel block,
    channels of this program and which of them exist.

    Channel blocks come first in launch order: neighbours run at the same time and share what they load per token.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    chunks = tl.cdiv(L, length)
    block = pid % blocks
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    first = (chunk * length).to(tl.int64)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    # The compiler drops a mask that it knows to be true.
    inside = tl.full((BLOCK_E,), True, tl.int1) if E % BLOCK_E == 0 else e < E
    return n, n * chunks + chunk, first, tl.minimum(length, L - first), block, e, inside


@triton.jit
def _load_channels(ptr, inside):
    """Loads a value for each channel as float32, 0 for those past the last."""
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_channels(ptr, value, inside):
    """Stores a value for each channel."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_projection(weight_ptr, bias_ptr, e, inside, E: tl.constexpr, RANK: tl.constexpr):
    """Returns the RANK weights, from the transposed dt_weight (RANK, E), and the bias of each channel."""
    weights = ()
    for r in tl.static_range(RANK):
        weights += (_load_channels(weight_ptr + r * E + e, inside),)
    return weights, _load_channels(bias_ptr + e, inside)


@triton.jit
def _project(dt_ptr, weights, bias):
    """Computes ``dt · dt_weight + dt_bias`` of a token."""
    pre = bias
    for r in tl.static_range(len(weights)):
        pre += tl.load(dt_ptr + r).to(tl.float32) * weights[r]
    return pre


@triton.jit
def _steps_at(dt_ptr, n, t, e, L, stride_dn, E: tl.constexpr, STRIDE_DT: tl.constexpr, RANK: tl.constexpr):
    """Points to the step sizes of a token: to those of the channels or, with a rank, to its first component."""
    if RANK == 0:
        dt_ptr += (n * L + t) * E + e
    else:
        dt_ptr += n * stride_dn + t * STRIDE_DT
    return dt_ptr


@triton.jit
def _softplus(x):
    """Returns log(1 + exp(x)) with a relative error near float32's for every x.

    With z = exp(-|x|), log(1 + z) is z times a polynomial of degree 8, fitted for the smallest relative error on
    [0, 1]: 3.0e-8, and 2.3e-7 with float32's rounding. log(1 + z) itself would lose all digits for small step sizes.
    """
    z = tl.exp2(tl.abs(x) * -LOG2_E)
    series = 0.0052325702721 * z - 0.0295047545526
    series = series * z + 0.0782251804837
    series = series * z - 0.1366318249327
    series = series * z + 0.1910597831501
    series = series * z - 0.2484297542970
    series = series * z + 0.3331909605664
    series = series * z - 0.4999949311508
    series = series * z + 0.9999999698815
    return tl.maximum(x, 0.0) + z * series


@triton.jit
def _softplus_slope(step):
    """Returns the derivative of softplus, 1 - exp(-step), from its value.

    Below 1/2, where the difference would lose digits, by a polynomial of degree 5: relative error 1.4e-9.
    """
    series = -0.0011216345412 * step + 0.0081873856437
    series = series * step - 0.0416290890537
    series = series * step + 0.1666622408307
    series = series * step - 0.4999998074637
    series = series * step + 0.9999999986265
    return tl.where(step < 0.5, step * series, 1.0 - tl.exp2(step * -LOG2_E))


@triton.jit
def _advance(
    state, decay, x_ptr, dt_ptr, B_ptr, h_ptr, rate, weights, bias, inside,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr,
    ADJOINT: tl.constexpr, STORE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Takes the state through the ``COUNT`` tokens that start at the pointers and, if STORE, stores it after each.

    ADJOINT takes mu = a lambda through them from the last to the first. ``rate`` is A log2(e). Returns the state and
    ``decay`` times the factors on its way. Without weights, the step sizes are given.
    """
    xs, steps, Bs = (), (), ()
    for j in tl.static_range(COUNT):
        xs += (_load_channels(x_ptr + j * E, inside),)
        if len(weights) > 0:
            steps += (_project(dt_ptr + j * STRIDE_DT, weights, bias),)
        else:
            steps += (_load_channels(dt_ptr + j * STRIDE_DT, inside),)
        if not ADJOINT:
            Bs += (tl.load(B_ptr + j * STRIDE_B).to(tl.float32),)
    for j in tl.static_range(COUNT):
        step = steps[COUNT - 1 - j] if ADJOINT else steps[j]
        if len(weights) > 0:
            step = _softplus(step)
        factor = tl.exp2(step * rate)
        decay *= factor
        state = factor * (state + xs[COUNT - 1 - j]) if ADJOINT else factor * state + step * (Bs[j] * xs[j])
        if STORE:
            _store_channels(h_ptr + j * E, state, inside)
    return state, decay


@triton.jit
def _walk(
    state, x_ptr, dt_ptr, B_ptr, h_ptr, rate, weights, bias, inside, tokens,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr,
    ADJOINT: tl.constexpr, STORE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Takes the state through all tokens of a chunk: through whole groups, and one by one through those past them."""
    decay = tl.full(state.shape, 1.0, tl.float32)
    groups = tokens // GROUP
    whole = groups * GROUP
    if ADJOINT:
        for i in range(tokens - whole):
            t = tokens - 1 - i
            state, decay = _advance(
                state, decay, x_ptr + t * E, dt_ptr + t * STRIDE_DT, B_ptr, h_ptr, rate, weights, bias, inside,
                E, STRIDE_DT, STRIDE_B, ADJOINT, STORE, 1,
            )  # fmt: skip
    for i in range(groups):
        t = (groups - 1 - i if ADJOINT else i) * GROUP
        state, decay = _advance(
            state, decay, x_ptr + t * E, dt_ptr + t * STRIDE_DT, B_ptr + t * STRIDE_B, h_ptr + t * E, rate, weights,
            bias, inside, E, STRIDE_DT, STRIDE_B, ADJOINT, STORE, GROUP,
        )  # fmt: skip
    if not ADJOINT:
        for t in range(whole, tokens):
            state, decay = _advance(
                state, decay, x_ptr + t * E, dt_ptr + t * STRIDE_DT, B_ptr + t * STRIDE_B, h_ptr + t * E, rate,
                weights, bias, inside, E, STRIDE_DT, STRIDE_B, ADJOINT, STORE, 1,
            )  # fmt: skip
    return state, decay


@triton.jit(do_not_specialize=['L', 'length', 'stride_dn', 'stride_Bn'], do_not_specialize_on_alignment=['B_ptr'])
def carry_kernel(
    x_ptr, dt_ptr, B_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, end_ptr, decay_ptr, L, length, stride_dn, stride_Bn,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr, RANK: tl.constexpr,
    ADJOINT: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes what one chunk contributes at its end, started from 0, and the factor that it puts on its start.

    Grid: images x chunks x channel blocks. Reads x (u, or dh if ADJOINT) and the step size of its chunk; writes
    ``BLOCK_E`` values of end and decay, (N, chunks, E) each. ADJOINT walks backwards: its end is mu = a lambda at the
    first token.
    """
    n, place, first, tokens, _, e, inside = _locate(L, length, E, BLOCK_E)
    weights, bias = _load_projection(dt_weight_ptr, dt_bias_ptr, e, inside, E, RANK)
    end, decay = _walk(
        tl.zeros((BLOCK_E,), tl.float32), x_ptr + (n * L + first) * E + e,
        _steps_at(dt_ptr, n, first, e, L, stride_dn, E, STRIDE_DT, RANK), B_ptr + n * stride_Bn + first * STRIDE_B,
        x_ptr, _load_channels(A_ptr + e, inside) * LOG2_E, weights, bias, inside, tokens,
        E, STRIDE_DT, STRIDE_B, ADJOINT, False, GROUP,
    )  # fmt: skip
    _store_channels(end_ptr + place * E + e, end, inside)
    _store_channels(decay_ptr + place * E + e, decay, inside)


@triton.jit
def _compose(a1, b1, a2, b2):
    """Composes two steps ``h -> a h + b``, the first one first."""
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize=['chunks'])
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


@triton.jit(do_not_specialize=['L', 'length', 'stride_dn', 'stride_Bn'], do_not_specialize_on_alignment=['B_ptr'])
def scan_kernel(
    u_ptr, dt_ptr, B_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, start_ptr, h_ptr, L, length, stride_dn, stride_Bn,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr, RANK: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes the state of one chunk from its start.

    Grid: images x chunks x channel blocks. Reads u and the step size of its chunk, ``BLOCK_E`` values of start
    (N, chunks, E); writes h of its chunk.
    """
    n, place, first, tokens, _, e, inside = _locate(L, length, E, BLOCK_E)
    weights, bias = _load_projection(dt_weight_ptr, dt_bias_ptr, e, inside, E, RANK)
    token = (n * L + first) * E + e
    _walk(
        _load_channels(start_ptr + place * E + e, inside), u_ptr + token,
        _steps_at(dt_ptr, n, first, e, L, stride_dn, E, STRIDE_DT, RANK), B_ptr + n * stride_Bn + first * STRIDE_B,
        h_ptr + token, _load_channels(A_ptr + e, inside) * LOG2_E, weights, bias, inside, tokens,
        E, STRIDE_DT, STRIDE_B, False, True, GROUP,
    )  # fmt: skip


@triton.jit
def _retreat(
    mu, sums, dh_ptr, h_ptr, u_ptr, dy_ptr, dt_ptr, B_ptr, du_ptr, ddt_ptr, dB_ptr, has_previous, A, D, weights, bias,
    inside,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr, CORE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Takes mu = a lambda through the ``COUNT`` tokens that start at the pointers, from the last to the first.

    Stores the gradients of these tokens; returns mu and the sums of each channel: dA and, in the CORE, dD, that of the
    bias and those of the weights. ``has_previous`` says whether a token stands before them in the image.
    """
    inputs = ()
    for j in tl.static_range(COUNT):
        if len(weights) > 0:
            step = _project(dt_ptr + j * STRIDE_DT, weights, bias)
        else:
            step = _load_channels(dt_ptr + j * STRIDE_DT, inside)
        if j == 0:
            previous = tl.load(h_ptr - E, mask=inside & has_previous, other=0.0)
        else:
            previous = _load_channels(h_ptr + (j - 1) * E, inside)
        dh = _load_channels(dh_ptr + j * E, inside)
        u = _load_channels(u_ptr + j * E, inside)
        dy = _load_channels(dy_ptr + j * E, inside) if CORE else dh
        inputs += ((step, previous, dh, u, dy, tl.load(B_ptr + j * STRIDE_B).to(tl.float32)),)
    for back in tl.static_range(COUNT):
        step, previous, dh, u, dy, B = inputs[COUNT - 1 - back]
        if len(weights) > 0:
            step = _softplus(step)
        adjoint = mu + dh
        mu = adjoint * tl.exp2(step * (A * LOG2_E))
        dexponent = mu * previous
        along_u = adjoint * u
        dstep = dexponent * A + along_u * B
        du = adjoint * step * B
        tl.store(dB_ptr + (COUNT - 1 - back), tl.sum(along_u * step, 0))
        updated = (sums[0] + dexponent * step,)
        if CORE:
            du += dy * D
            dstep *= _softplus_slope(step)
            updated += (sums[1] + dy * u, sums[2] + dstep)
        for r in tl.static_range(len(weights)):
            at = (COUNT - 1 - back) * len(weights) + r
            tl.store(ddt_ptr + at, tl.sum(dstep * weights[r], 0))
            updated += (sums[3 + r] + dstep * tl.load(dt_ptr + (COUNT - 1 - back) * STRIDE_DT + r).to(tl.float32),)
        if len(weights) == 0:
            _store_channels(ddt_ptr + (COUNT - 1 - back) * E, dstep, inside)
        _store_channels(du_ptr + (COUNT - 1 - back) * E, du, inside)
        sums = updated
    return mu, sums


@triton.jit(do_not_specialize=['N', 'L', 'length', 'stride_dn', 'stride_Bn'], do_not_specialize_on_alignment=['B_ptr'])
def scan_backward_kernel(
    dh_ptr, h_ptr, u_ptr, dt_ptr, B_ptr, dy_ptr, dt_weight_ptr, dt_bias_ptr, A_ptr, D_ptr, start_ptr,
    du_ptr, ddt_ptr, dB_ptr, sums_ptr, N, L, length, stride_dn, stride_Bn,
    E: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_B: tl.constexpr, RANK: tl.constexpr,
    CORE: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one chunk from the adjoint that enters at its end, walking backwards.

    Grid: images x chunks x channel blocks. Reads dh, h, u, (in the CORE) dy and the step size of its chunk. Writes du
    and, if RANK is 0, ddt: the gradient of the given step size or, in the CORE, of what softplus made it from. Writes
    partial sums over its channels of dB (channel blocks, N, L) and, with RANK, ddt (channel blocks, N, L, RANK);
    partial sums over its tokens of dA and, in the CORE, of dD and the gradients of bias, (E,) each, and weights, (E,
    RANK), one after the other: (N, chunks, E or (3 + RANK) E).
    """
    n, place, first, tokens, block, e, inside = _locate(L, length, E, BLOCK_E)
    weights, bias = _load_projection(dt_weight_ptr, dt_bias_ptr, e, inside, E, RANK)
    A = _load_channels(A_ptr + e, inside)
    D = _load_channels(D_ptr + e, inside)
    mu = _load_channels(start_ptr + place * E + e, inside)
    sums = ()
    for _ in tl.static_range(3 + RANK if CORE else 1):
        sums += (tl.zeros((BLOCK_E,), tl.float32),)

    channels = (n * L + first) * E + e
    dh_ptr += channels
    h_ptr += channels
    u_ptr += channels
    dy_ptr += channels
    du_ptr += channels
    dt_ptr = _steps_at(dt_ptr, n, first, e, L, stride_dn, E, STRIDE_DT, RANK)
    B_ptr += n * stride_Bn + first * STRIDE_B
    partial = (block.to(tl.int64) * N + n) * L + first
    dB_ptr += partial
    STRIDE_DDT: tl.constexpr = E if RANK == 0 else RANK
    if RANK == 0:
        ddt_ptr += channels
    else:
        ddt_ptr += partial * RANK

    groups = tokens // GROUP
    for i in range(tokens - groups * GROUP):
        t = tokens - 1 - i
        mu, sums = _retreat(
            mu, sums, dh_ptr + t * E, h_ptr + t * E, u_ptr + t * E, dy_ptr + t * E, dt_ptr + t * STRIDE_DT,
            B_ptr + t * STRIDE_B, du_ptr + t * E, ddt_ptr + t * STRIDE_DDT, dB_ptr + t, first + t > 0, A, D, weights,
            bias, inside, E, STRIDE_DT, STRIDE_B, CORE, 1,
        )  # fmt: skip
    for i in range(groups):
        t = (groups - 1 - i) * GROUP
        mu, sums = _retreat(
            mu, sums, dh_ptr + t * E, h_ptr + t * E, u_ptr + t * E, dy_ptr + t * E, dt_ptr + t * STRIDE_DT,
            B_ptr + t * STRIDE_B, du_ptr + t * E, ddt_ptr + t * STRIDE_DDT, dB_ptr + t, first + t > 0, A, D, weights,
            bias, inside, E, STRIDE_DT, STRIDE_B, CORE, GROUP,
        )  # fmt: skip
    sums_ptr += place * len(sums) * E
    for k in tl.static_range(len(sums)):
        _store_channels(sums_ptr + (k * E + e if k < 3 else 3 * E + e * RANK + k - 3), sums[k], inside)


@triton.jit
def _locate_tile(tile, L, BLOCK_T: tl.constexpr):
    """Returns image and tokens of a tile; the tiles of all images are counted through."""
    tiles = tl.cdiv(L, BLOCK_T)
    return (tile // tiles).to(tl.int64), tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)


@triton.jit
def _load_low_rank(dt_ptr, n, t, r, L, stride_dn, stride_dt, RANK: tl.constexpr):
    """Loads dt for tokens t (rows) and components r (columns) as float32, 0 outside."""
    offset = n * stride_dn + t.to(tl.int64)[:, None] * stride_dt + r[None, :]
    return tl.load(dt_ptr + offset, mask=(t < L)[:, None] & (r < RANK)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_weight(dt_weight_ptr, r, e, E, RANK: tl.constexpr):
    """Loads the transposed dt_weight (RANK, E) for components r (rows) and channels e (columns), 0 outside."""
    return tl.load(dt_weight_ptr + r[:, None] * E + e[None, :], mask=(r < RANK)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit(do_not_specialize=['L', 'stride_dn'])
def step_size_kernel(
    dt_ptr, dt_weight_ptr, dt_bias_ptr, delta_ptr, L, E, stride_dn, stride_dt,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the step size ``softplus(dt · dt_weight + dt_bias)`` of one tile in float32.

    Grid: tiles of all images x channel blocks. Reads dt of its tokens and dt_weight of its channels, writes delta.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    n, t = _locate_tile(pid // blocks, L, BLOCK_T)
    e = pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    r = tl.arange(0, BLOCK_R)
    dt = _load_low_rank(dt_ptr, n, t, r, L, stride_dn, stride_dt, RANK)
    weight = _load_weight(dt_weight_ptr, r, e, E, RANK)
    bias = tl.load(dt_bias_ptr + e, mask=e < E, other=0.0)
    delta = _softplus(tl.dot(dt, weight, input_precision=PRECISION) + bias[None, :])
    offset = (n * L + t)[:, None] * E + e[None, :]
    tl.store(delta_ptr + offset, delta, mask=(t < L)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=['N', 'L', 'tiles', 'stride_dn'])
def step_size_backward_kernel(
    dpre_ptr, dt_ptr, dt_weight_ptr, ddt_ptr, ddt_weight_ptr, N, L, E, tiles, stride_dn, stride_dt,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes what some tiles add to the gradients of dt and dt_weight.

    Grid: ranges of tiles of all images x channel blocks. Reads dpre, the gradient before softplus, and dt of its
    tokens. Writes the partial sums over its channels of ddt (channel blocks, N, L, RANK) and over its tokens of
    ddt_weight (ranges, E, RANK).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_E)
    block = pid % blocks
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    r = tl.arange(0, BLOCK_R)
    weight = tl.trans(_load_weight(dt_weight_ptr, r, e, E, RANK))
    dweight = tl.zeros((BLOCK_E, BLOCK_R), tl.float32)
    begin = pid // blocks * tiles
    for tile in range(begin, tl.minimum(begin + tiles, N * tl.cdiv(L, BLOCK_T))):
        n, t = _locate_tile(tile, L, BLOCK_T)
        inside = (t < L)[:, None] & (e < E)[None, :]
        dpre = tl.load(dpre_ptr + (n * L + t)[:, None] * E + e[None, :], mask=inside, other=0.0)
        rows = ((block.to(tl.int64) * N + n) * L + t)[:, None] * RANK
        mask = (t < L)[:, None] & (r < RANK)[None, :]
        tl.store(ddt_ptr + rows + r[None, :], tl.dot(dpre, weight, input_precision=PRECISION), mask=mask)
        dt = _load_low_rank(dt_ptr, n, t, r, L, stride_dn, stride_dt, RANK)
        dweight += tl.dot(tl.trans(dpre), dt, input_precision=PRECISION)
    place = ((pid // blocks).to(tl.int64) * E + e)[:, None] * RANK + r[None, :]
    tl.store(ddt_weight_ptr + place, dweight, mask=(e < E)[:, None] & (r < RANK)[None, :])


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
        self.B, self.A = uniform_tokens(B), A.contiguous()
        self.low_rank = self.dt = uniform_tokens(dt)
        self.rank = 0 if dt_weight is None else dt_weight.shape[1]
        # The kernels do not touch the projection without a rank; a pointer has to be there all the same.
        self.dt_weight = dt_weight.t().contiguous() if self.rank else self.A
        self.dt_bias = dt_bias.contiguous() if self.rank else self.A

        self.blocks = ceil_div(self.E, BLOCK_E)
        length = max(MIN_LENGTH, self.N * self.blocks * self.L // TARGET_PROGRAMS)
        self.length = ceil_div(length, GROUP) * GROUP
        self.chunks = ceil_div(self.L, self.length)
        self.programs = self.N * self.chunks * self.blocks
        self.by_product = self.rank >= DOT_RANK
        if self.by_product:
            self.dt = self._step_sizes()
        self.sizes = (self.L, self.length, self.dt.stride(0), self.B.stride(0))
        self.constants = {
            'E': self.E,
            'STRIDE_DT': self.dt.stride(1),
            'STRIDE_B': self.B.stride(1),
            'RANK': 0 if self.by_product else self.rank,
            'BLOCK_E': BLOCK_E,
            'num_warps': 1,
        }

    def states(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the states h in the given dtype, contiguous, shape of u."""
        h = torch.empty(self.u.shape, dtype=dtype, device=self.u.device)
        launch(
            scan_kernel, self.programs, self.u, self.dt, self.B, self.dt_weight, self.dt_bias, self.A,
            self._starts(self.u, False), h, *self.sizes, **self.constants, GROUP=GROUP,
        )  # fmt: skip
        return h

    def gradients(
        self, dh: torch.Tensor, h: torch.Tensor, dy=None, D=None, others: tuple[PartialSum, ...] = ()
    ) -> tuple[torch.Tensor, ...]:
        """Returns du, ddt, dB, dA, if the step size is computed here ddt_weight, ddt_bias and dD, and the other sums.

        Args:
            dh: Gradient of the states, contiguous.
            h: The states in float32.
            dy: Gradient of the observation, for its skip D u; only if the step size is computed here.
            D: Skip weight; likewise.
            others: Partial sums of other kernels, which are added in the same launch.
        """
        rank, dtype, E = self.constants['RANK'], self.u.dtype, self.E
        du = torch.empty(self.u.shape, dtype=dtype, device=self.u.device)
        dB = self._empty(self.blocks, self.N, self.L)
        if rank:
            ddt = self._empty(self.blocks, self.N, self.L, rank)
        else:
            ddt = torch.empty(self.u.shape, dtype=torch.float32 if self.rank else dtype, device=self.u.device)
        sums = self._empty(self.N * self.chunks, (3 + rank if self.rank else 1) * E)
        if not self.rank:
            dy, D = dh, self.A  # not touched
        launch(
            scan_backward_kernel, self.programs, dh, h, self.u, self.dt, self.B, dy, self.dt_weight, self.dt_bias,
            self.A, D.contiguous(), self._starts(dh, True), du, ddt, dB, sums, self.N, *self.sizes, **self.constants,
            CORE=self.rank > 0, GROUP=GROUP_BACKWARD,
        )  # fmt: skip
        of_channels = [(part, torch.float32) for part in sums.split(E, 1)[:3]]
        parts = [(dB, dtype), *of_channels, *others]
        if not self.rank:
            dB, dA, *others = add_partial_sums(*parts)
            return du, ddt, dB, dA, *others
        weight = sums[:, 3 * E :]
        if self.by_product:
            ddt, weight = self._projection_gradients(ddt)
        ddt, weight, dB, dA, dD, ddt_bias, *others = add_partial_sums((ddt, dtype), (weight, torch.float32), *parts)
        return du, ddt, dB, dA, weight.view(E, self.rank), ddt_bias, dD, *others

    def _step_sizes(self) -> torch.Tensor:
        """Returns the step size in float32, contiguous, (N, L, E), as a matrix product."""
        delta = self._empty(self.N, self.L, self.E)
        launch(
            step_size_kernel, self._dot_tiles() * self._dot_blocks(), self.dt, self.dt_weight,
            self.dt_bias, delta, self.L, self.E, *self.low_rank.stride()[:2], **self._dot_constants(),
        )  # fmt: skip
        return delta

    def _projection_gradients(self, dpre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns partial sums of ddt (any, N, L, R) and ddt_weight (any, E, R), from the gradient before softplus."""
        blocks, all_tiles = self._dot_blocks(), self._dot_tiles()
        tiles = max(1, blocks * all_tiles // DOT_PROGRAMS)
        ranges = ceil_div(all_tiles, tiles)
        ddt = self._empty(blocks, self.N, self.L, self.rank)
        ddt_weight = self._empty(ranges, self.E, self.rank)
        launch(
            step_size_backward_kernel, ranges * blocks, dpre, self.low_rank, self.dt_weight, ddt, ddt_weight,
            self.N, self.L, self.E, tiles, *self.low_rank.stride()[:2], **self._dot_constants(),
        )  # fmt: skip
        return ddt, ddt_weight

    def _dot_tiles(self) -> int:
        return self.N * ceil_div(self.L, DOT_BLOCK[0])

    def _dot_channels(self) -> int:
        return DOT_BLOCK[1] if self.rank <= 32 else DOT_BLOCK[1] // 2

    def _dot_blocks(self) -> int:
        return ceil_div(self.E, self._dot_channels())

    def _dot_constants(self) -> dict[str, int]:
        return {
            'RANK': self.rank,
            'BLOCK_R': max(16, triton.next_power_of_2(self.rank)),
            'BLOCK_T': DOT_BLOCK[0],
            'BLOCK_E': self._dot_channels(),
            'num_warps': 4,
            'num_stages': 1,
        }

    def _starts(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """Returns the state (or, from the other end, the adjoint) that enters each chunk, (N, chunks, E)."""
        if self.chunks == 1:
            return torch.zeros(self.N, 1, self.E, dtype=torch.float32, device=x.device)
        end, decay, start = (self._empty(self.N, self.chunks, self.E) for _ in range(3))
        launch(
            carry_kernel, self.programs, x, self.dt, self.B, self.dt_weight, self.dt_bias, self.A, end, decay,
            *self.sizes, **self.constants, ADJOINT=adjoint, GROUP=GROUP,
        )  # fmt: skip
        chunks, channels = COMBINE_BLOCK
        launch(
            combine_kernel, self.N * ceil_div(self.E, channels), end, decay, start, self.chunks, self.E,
            ADJOINT=adjoint, BLOCK_CHUNKS=chunks, BLOCK_E=channels, num_warps=4,
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
