"""Triton kernels of the depthwise convolution, forward and backward, with what stands around it.

A program takes ``BLOCK_E`` channels of tiles of ``BLOCK_H`` rows and ``BLOCK_W`` columns, one tile below the other. The
outer loop runs over the columns of the kernel, the next over the source rows: what is loaded once serves every row of
the tile that has a tap there (4.5 loads a value of 4 rows, all but the first from the first-level cache). Taps stay in
registers for all tiles: in memory the nine of a channel lie together, so that each is a load of 4 bytes. All loops
over a tile are unrolled.

Backward is one pass without an activation: the neighbours of a pixel are read once, for its gradient and for those of
the taps. With one, a pass before it computes the convolution again, writes the gradient before the activation, and sums
those of weight and bias. In a 16-bit dtype each pass moves 6 bytes per value, or 4 after another one; the gradient
between them is rounded, as it is by PyTorch's own functions, but not what the sums are made of.

All arithmetic is float32. The sums leave each program in a place of their own and are added in a fixed order
afterwards: no atomics, the same bits in every run. The first pixel of a row has a 64-bit offset. Block sizes and warps
are the fastest of nine that were tried on an H100, the numbers of programs of four on an H200.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import add_partial_sums
from ..triton_backend import ceil_div, launch, register
from .reference import KERNEL, depthwise_conv_backward_reference, depthwise_conv_reference

BLOCK_H = (4, 2)
"""Rows of a tile of the output, for strides 1 and 2: then it has twice the rows and columns of the input."""
BLOCK_VALUES = 256
"""Values of a row of a tile, 4 a thread: columns times channels."""
BLOCK_E = 32
"""Channels of a program."""
NUM_WARPS = 2
TARGET_PROGRAMS = 8192
"""Programs that are enough to fill a GPU; beyond, each takes several tiles: taps are loaded less often."""
TARGET_OF_SUMS = 1024
"""The same of a gradient without an activation, which sums those of the taps besides: partial sums stay few."""

SIDE = tl.constexpr(3)
TAPS = tl.constexpr(KERNEL)

_VARYING = ['N', 'H', 'W']
"""What changes with the size of an image: a kernel for each of its classes would gain nothing."""


@triton.jit
def _locate(E, tiles, EXACT: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the first tile of this program, its channels, and which of them there are."""
    blocks = tl.cdiv(E, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    channels = tl.full((BLOCK_E,), 1, tl.int1) if EXACT else e < E
    return tl.program_id(0) // blocks * tiles, e, channels


@triton.jit
def _place(tile, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Returns image, first row and first column of a tile of maps (N, H, W, E); the next tile is the one below."""
    down = tl.cdiv(H, BLOCK_H)
    across = tl.cdiv(W, BLOCK_W)
    return (tile // (down * across)).to(tl.int64), tile % down * BLOCK_H, tile // down % across * BLOCK_W


@triton.jit
def _start(n, y, x, H, W, stride_t):
    """Returns the offset of pixel (n, y, x) of a map and the distance of two rows, in 64 bits."""
    return ((n * H + y) * W + x) * stride_t, W.to(tl.int64) * stride_t


@triton.jit
def _inside(n, y, x, channels, N, H, W):
    """Returns which pixels (n, y, x) and channels there are."""
    row = (n < N) & (y >= 0) & (y < H)
    return (row & (x >= 0) & (x < W))[:, None] & channels[None, :]


@triton.jit
def _load(ptr, columns, e, inside, stride_t):
    """Loads pixels of a row as float32, 0 where they are not inside; ptr is that of column 0."""
    return tl.load(ptr + (columns[:, None] * stride_t + e[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, columns, e, inside, stride_t):
    """Stores pixels of a row, where they are inside; ptr is that of column 0."""
    tl.store(ptr + (columns[:, None] * stride_t + e[None, :]), value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relu(x):
    """Returns ReLU of x; NaN stays, as the comparison is false for it."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _load_taps(weight_ptr, e, channels):
    """Loads the taps of all channels, each as a row."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(weight_ptr + e * TAPS + k, mask=channels, other=0.0)[None, :],)
    return taps


@triton.jit
def _add_taps(totals, value, taps, kx: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Adds a source row to the total of each row of the tile, times the tap between them, if there is one.

    The tap of row i is in row ``FIRST + STEP i`` and column kx of the kernel.
    """
    updated = ()
    for i in tl.static_range(len(totals)):
        if FIRST + STEP * i >= 0 and FIRST + STEP * i < SIDE:
            updated += (totals[i] + taps[(FIRST + STEP * i) * SIDE + kx] * value,)
        else:
            updated += (totals[i],)
    return updated


@triton.jit
def _convolve(
    x_ptr, taps, bias, n, y0, x0, columns, e, channels, N, H, W, stride_t,
    STRIDE: tl.constexpr, RELU_INPUT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Returns the rows of the convolution of a tile, before the activation."""
    x_start, pitch = _start(n, STRIDE * y0, STRIDE * x0, H, W, stride_t)
    pre = ()
    for _ in tl.static_range(BLOCK_H):
        pre += (tl.zeros((columns.shape[0], e.shape[0]), tl.float32) + bias,)
    for kx in tl.static_range(SIDE):
        for row in tl.static_range(-1, STRIDE * (BLOCK_H - 1) + 2):
            at = STRIDE * columns + kx - 1
            inside = _inside(n, STRIDE * y0 + row, STRIDE * x0 + at, channels, N, H, W)
            x = _load(x_ptr + (x_start + row * pitch), at, e, inside, stride_t)
            pre = _add_taps(pre, _relu(x) if RELU_INPUT else x, taps, kx, row + 1, -STRIDE)
    return pre


@triton.jit
def _load_bias(bias_ptr, e, channels, WITH_BIAS: tl.constexpr):
    """Loads the bias of all channels as a row; 0 without a bias."""
    bias = tl.load(bias_ptr + e, mask=channels, other=0.0) if WITH_BIAS else tl.zeros((e.shape[0],), tl.float32)
    return bias[None, :]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=['tiles'])
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, N, H, W, E, tiles, stride_t,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, RELU_INPUT: tl.constexpr, RESIDUAL: tl.constexpr,
    WITH_BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the convolution of some tiles, with activation and residual.

    Grid: blocks of tiles x channel blocks. Reads x of its tiles and of the rows and columns around them; writes y.
    """
    first, e, channels = _locate(E, tiles, EXACT, BLOCK_E)
    columns = tl.arange(0, BLOCK_W)
    taps = _load_taps(weight_ptr, e, channels)
    bias = _load_bias(bias_ptr, e, channels, WITH_BIAS)
    H_out, W_out = tl.cdiv(H, STRIDE), tl.cdiv(W, STRIDE)
    for tile in range(first, first + tiles):
        n, y0, x0 = _place(tile, H_out, W_out, BLOCK_H, BLOCK_W)
        pre = _convolve(
            x_ptr, taps, bias, n, y0, x0, columns, e, channels, N, H, W, stride_t, STRIDE, RELU_INPUT, BLOCK_H
        )
        x_start, pitch = _start(n, y0, x0, H, W, stride_t)
        y_start, y_pitch = _start(n, y0, x0, H_out, W_out, E)
        for i in tl.static_range(BLOCK_H):
            inside = _inside(n, y0 + i, x0 + columns, channels, N, H_out, W_out)
            y = pre[i]
            if ACTIVATION == 'silu':
                y = y * tl.sigmoid(y)
            elif ACTIVATION == 'relu':
                y = _relu(y)
            if RESIDUAL:
                x = _load(x_ptr + (x_start + i * pitch), columns, e, inside, stride_t)
                y += _relu(x) if RELU_INPUT else x
            _store(y_ptr + (y_start + i * y_pitch), y, columns, e, inside, E)


@triton.jit
def _add_products(sums, x, dpre, kx: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Adds the products of each two rows to the gradient of the tap between them, if there is one.

    One of x and dpre is a row of a map, the other one the rows i of a tile; the tap is as in `_add_taps`.
    """
    updated = ()
    for k in tl.static_range(len(sums)):
        total = sums[k]
        for i in tl.static_range(len(x)):
            if k == (FIRST + STEP * i) * SIDE + kx and FIRST + STEP * i >= 0:
                total += x[i] * dpre
        updated += (total,)
    return updated


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns a tuple of rows of zeros."""
    rows = ()
    for _ in tl.static_range(COUNT):
        rows += (tl.zeros((BLOCK_W, BLOCK_E), tl.float32),)
    return rows


@triton.jit
def _store_sums(sums_ptr, dweight, dbias, e, channels, E):
    """Stores what this program adds to the gradient of the weight, (E, 9), and to that of the bias after it, (E,)."""
    sums_ptr += (tl.program_id(0) // tl.cdiv(E, e.shape[0])).to(tl.int64) * (TAPS + 1) * E
    for k in tl.static_range(TAPS):
        tl.store(sums_ptr + e * TAPS + k, tl.sum(dweight[k], 0), mask=channels)
    tl.store(sums_ptr + TAPS * E + e, tl.sum(dbias, 0), mask=channels)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=['tiles'])
def conv_activation_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, dpre_ptr, sums_ptr, N, H, W, E, tiles, stride_t,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, RELU_INPUT: tl.constexpr,
    WITH_BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradient before the activation of some tiles and, before it is rounded, the sums of the parameters.

    Grid: blocks of tiles x channel blocks. Reads dy of its tiles, and x of its tiles and of the rows and columns around
    them; writes dpre, and sums (blocks of tiles, 10 E), see `_store_sums`.
    """
    first, e, channels = _locate(E, tiles, EXACT, BLOCK_E)
    columns = tl.arange(0, BLOCK_W)
    taps = _load_taps(weight_ptr, e, channels)
    bias = _load_bias(bias_ptr, e, channels, WITH_BIAS)
    dweight = _zeros(TAPS, BLOCK_W, BLOCK_E)
    dbias = tl.zeros((BLOCK_W, BLOCK_E), tl.float32)
    H_out, W_out = tl.cdiv(H, STRIDE), tl.cdiv(W, STRIDE)
    for tile in range(first, first + tiles):
        n, y0, x0 = _place(tile, H_out, W_out, BLOCK_H, BLOCK_W)
        pre = _convolve(
            x_ptr, taps, bias, n, y0, x0, columns, e, channels, N, H, W, stride_t, STRIDE, RELU_INPUT, BLOCK_H
        )
        y_start, y_pitch = _start(n, y0, x0, H_out, W_out, E)
        gradients = ()
        for i in tl.static_range(BLOCK_H):
            inside = _inside(n, y0 + i, x0 + columns, channels, N, H_out, W_out)
            dpre = _load(dy_ptr + (y_start + i * y_pitch), columns, e, inside, E)
            if ACTIVATION == 'silu':
                sigmoid = tl.sigmoid(pre[i])
                # Beyond the map pre may be NaN, from the border's.
                dpre = tl.where(inside, dpre * sigmoid * (1.0 + pre[i] * (1.0 - sigmoid)), 0.0)
            else:
                dpre = tl.where(pre[i] <= 0.0, 0.0, dpre)
            _store(dpre_ptr + (y_start + i * y_pitch), dpre, columns, e, inside, E)
            dbias += dpre
            gradients += (dpre,)
        x_start, x_pitch = _start(n, STRIDE * y0, STRIDE * x0, H, W, stride_t)
        for kx in tl.static_range(SIDE):
            for row in tl.static_range(-1, STRIDE * (BLOCK_H - 1) + 2):
                at = STRIDE * columns + kx - 1
                inside = _inside(n, STRIDE * y0 + row, STRIDE * x0 + at, channels, N, H, W)
                x = _load(x_ptr + (x_start + row * x_pitch), at, e, inside, stride_t)
                dweight = _add_products(dweight, gradients, _relu(x) if RELU_INPUT else x, kx, row + 1, -STRIDE)
    _store_sums(sums_ptr, dweight, dbias, e, channels, E)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=['tiles'])
def conv_backward_kernel(
    dpre_ptr, dy_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr, N, H, W, E, tiles, stride_t,
    STRIDE: tl.constexpr, RELU_INPUT: tl.constexpr, RESIDUAL: tl.constexpr, WITH_SUMS: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of x from that before the activation, for some tiles.

    Grid: blocks of tiles x channel blocks, of the output's map. Reads dpre of its tiles and of the rows and columns
    around them and, where they matter, dy and x; writes dx, with stride 2 of two rows and columns for each of its own,
    and, if WITH_SUMS, sums (blocks of tiles, 10 E), see `_store_sums`: neighbours that are read once serve both.
    """
    first, e, channels = _locate(E, tiles, EXACT, BLOCK_E)
    columns = tl.arange(0, BLOCK_W)
    taps = _load_taps(weight_ptr, e, channels)
    dweight = _zeros(TAPS, BLOCK_W, BLOCK_E)
    dbias = tl.zeros((BLOCK_W, BLOCK_E), tl.float32)
    H_out, W_out = tl.cdiv(H, STRIDE), tl.cdiv(W, STRIDE)
    for tile in range(first, first + tiles):
        n, y0, x0 = _place(tile, H_out, W_out, BLOCK_H, BLOCK_W)
        y_start, y_pitch = _start(n, y0, x0, H_out, W_out, E)
        x_start, x_pitch = _start(n, STRIDE * y0, STRIDE * x0, H, W, stride_t)
        dx_start, dx_pitch = _start(n, STRIDE * y0, STRIDE * x0, H, W, E)
        for py in tl.static_range(STRIDE):
            for px in tl.static_range(STRIDE):
                across = STRIDE * columns + px
                dx = _zeros(BLOCK_H, BLOCK_W, BLOCK_E)
                x = ()
                if WITH_SUMS or RELU_INPUT:
                    for i in tl.static_range(BLOCK_H):
                        inside = _inside(n, STRIDE * (y0 + i) + py, STRIDE * x0 + across, channels, N, H, W)
                        value = _load(x_ptr + (x_start + (STRIDE * i + py) * x_pitch), across, e, inside, stride_t)
                        x += (_relu(value) if RELU_INPUT else value,)
                for kx in tl.static_range(SIDE):
                    if (px + 1 - kx) % STRIDE == 0:
                        for row in tl.static_range(STRIDE - 2, BLOCK_H + 2 - STRIDE + py):
                            at = columns + (px + 1 - kx) // STRIDE
                            inside = _inside(n, y0 + row, x0 + at, channels, N, H_out, W_out)
                            dpre = _load(dpre_ptr + (y_start + row * y_pitch), at, e, inside, E)
                            dx = _add_taps(dx, dpre, taps, kx, py + 1 - STRIDE * row, STRIDE)
                            if WITH_SUMS:
                                dweight = _add_products(dweight, x, dpre, kx, py + 1 - STRIDE * row, STRIDE)
                                if py == 0 and kx == 1 and row >= 0 and row < BLOCK_H:
                                    dbias += dpre
                for i in tl.static_range(BLOCK_H):
                    inside = _inside(n, STRIDE * (y0 + i) + py, STRIDE * x0 + across, channels, N, H, W)
                    gradient = dx[i]
                    if RESIDUAL:
                        gradient += _load(dy_ptr + (y_start + i * y_pitch), columns, e, inside, E)
                    if RELU_INPUT:
                        gradient = tl.where(x[i] <= 0.0, 0.0, gradient)
                    _store(dx_ptr + (dx_start + (STRIDE * i + py) * dx_pitch), gradient, across, e, inside, E)
    if WITH_SUMS:
        _store_sums(sums_ptr, dweight, dbias, e, channels, E)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Returns a map (N, H, W, E) as pixels (NHW, E) with neighbouring channels; a slice of a wider map stays a view."""
    pixels = x.flatten(0, 2)
    return pixels if pixels.stride(1) == 1 or pixels.shape[1] == 1 else pixels.contiguous()


def _launch(shape: torch.Size, stride: int, target: int) -> tuple[int, int, int, dict[str, int]]:
    """Returns tiles a program, their blocks, programs and constants of the kernels for an input (N, H, W, E).

    ``target`` is the number of programs that are enough.
    """
    N, H, W, E = shape
    rows = BLOCK_H[stride - 1]
    columns = BLOCK_VALUES // BLOCK_E
    blocks = ceil_div(E, BLOCK_E)
    all_tiles = N * ceil_div(ceil_div(H, stride), rows) * ceil_div(ceil_div(W, stride), columns)
    tiles = max(1, all_tiles * blocks // target)
    constants = {
        'STRIDE': stride, 'EXACT': E % BLOCK_E == 0, 'BLOCK_H': rows, 'BLOCK_W': columns, 'BLOCK_E': BLOCK_E,
        'num_warps': NUM_WARPS, 'num_stages': 1,
    }  # fmt: skip
    token_blocks = ceil_div(all_tiles, tiles)
    return tiles, token_blocks, token_blocks * blocks, constants


def depthwise_conv(x, weight, bias, stride, activation, relu_input, residual) -> torch.Tensor:
    """Computes the op `depthwise_conv`."""
    N, H, W, E = x.shape
    pixels = _pixels(x)
    y = torch.empty((N, -(-H // stride), -(-W // stride), E), dtype=x.dtype, device=x.device)
    tiles, _, programs, constants = _launch(x.shape, stride, TARGET_PROGRAMS)
    weight = weight.contiguous()
    # The kernel does not touch a bias that is not there; a pointer has to be there all the same.
    launch(
        conv_kernel, programs, pixels, weight, weight if bias is None else bias.contiguous(), y, N, H, W, E, tiles,
        pixels.stride(0), ACTIVATION=activation, RELU_INPUT=relu_input, RESIDUAL=residual,
        WITH_BIAS=bias is not None, **constants,
    )  # fmt: skip
    return y


def depthwise_conv_backward(
    dy, x, weight, bias, stride, activation, relu_input, residual
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the op `depthwise_conv_backward`."""
    N, H, W, E = x.shape
    pixels, dy, weight = _pixels(x), dy.contiguous(), weight.contiguous()
    activated, dpre = activation != 'none', dy
    tiles, blocks, programs, constants = _launch(x.shape, stride, TARGET_PROGRAMS if activated else TARGET_OF_SUMS)
    sizes = (N, H, W, E, tiles, pixels.stride(0))
    sums = torch.empty(blocks, (KERNEL + 1) * E, dtype=torch.float32, device=x.device)
    if activated:
        dpre = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
        launch(
            conv_activation_kernel, programs, dy, pixels, weight, weight if bias is None else bias.contiguous(), dpre,
            sums, *sizes, ACTIVATION=activation, RELU_INPUT=relu_input, WITH_BIAS=bias is not None, **constants,
        )  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        conv_backward_kernel, programs, dpre, dy, pixels, weight, dx, sums, *sizes,
        RELU_INPUT=relu_input, RESIDUAL=residual, WITH_SUMS=not activated, **constants,
    )  # fmt: skip
    (sums,) = add_partial_sums((sums, torch.float32))
    return dx, sums


register('depthwise_conv', depthwise_conv, depthwise_conv_reference)
register('depthwise_conv_backward', depthwise_conv_backward, depthwise_conv_backward_reference)
