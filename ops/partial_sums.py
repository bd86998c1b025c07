"""The Triton kernel that adds what programs of other kernels left as partial sums: those of one op in one launch.

A partial sum has a row for each program, (rows, ...). A program of this kernel takes some columns of one of them
through all its rows, ``BLOCK`` at a time, in an order that is always the same. PyTorch's own functions would be a
launch for each sum and another one for each that has to be converted.
"""

import torch
import triton
import triton.language as tl

from .triton_backend import ceil_div, launch

PartialSum = tuple[torch.Tensor, torch.dtype]
"""A tensor (rows, ...), float32, each row contiguous, and the dtype of its sum over the rows."""
MOST = 8
"""Partial sums of a launch, at most."""
BLOCK = ((4, 512), (256, 16))
"""Rows and columns of a tile: of partial sums with few rows, and of those with many, which mostly have few columns."""
MANY = 32
"""Rows from which they are many."""
NUM_WARPS = 4

_VARYING = [f'{name}{i}' for name in ('rows', 'columns', 'stride') for i in range(MOST)]


@triton.jit
def _add(part_ptr, out_ptr, rows, columns, stride, block, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds the rows of a block of columns, if it is one of theirs; returns how many blocks it lies beyond the first
    after them."""
    blocks = tl.cdiv(columns, BLOCK_C)
    if (block >= 0) & (block < blocks):
        r, c = tl.arange(0, BLOCK_R), block * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for first in range(0, rows, BLOCK_R):
            row = first + r
            mask = (row < rows)[:, None] & (c < columns)[None, :]
            total += tl.load(part_ptr + row.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + c, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=c < columns)
    return block - blocks


@triton.jit(do_not_specialize=_VARYING)
def partial_sums_kernel(
    part0, part1, part2, part3, part4, part5, part6, part7,
    out0, out1, out2, out3, out4, out5, out6, out7,
    rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7,
    columns0, columns1, columns2, columns3, columns4, columns5, columns6, columns7,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7,
    MANY_ROWS: tl.constexpr, COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R_MANY: tl.constexpr, BLOCK_C_MANY: tl.constexpr,
):  # fmt: skip
    """Adds the rows, ``stride`` apart, of ``COUNT`` partial sums (rows, columns), in float32, into sums (columns,).

    Grid: column blocks of the first, then those of the second, and so on. Bit i of ``MANY_ROWS`` chooses the tile of i.
    """
    parts = (part0, part1, part2, part3, part4, part5, part6, part7)
    outs = (out0, out1, out2, out3, out4, out5, out6, out7)
    rows = (rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7)
    columns = (columns0, columns1, columns2, columns3, columns4, columns5, columns6, columns7)
    strides = (stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7)
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (MANY_ROWS >> i) % 2 == 1:
            block = _add(parts[i], outs[i], rows[i], columns[i], strides[i], block, BLOCK_R_MANY, BLOCK_C_MANY)
        else:
            block = _add(parts[i], outs[i], rows[i], columns[i], strides[i], block, BLOCK_R, BLOCK_C)


def add_partial_sums(*parts: PartialSum) -> list[torch.Tensor]:
    """Returns the sum of each of up to ``MOST`` partial sums of one device, contiguous, in one launch."""
    outs = [torch.empty(part.shape[1:], dtype=dtype, device=part.device) for part, dtype in parts]
    rows, columns, strides, many, programs = [], [], [], 0, 0
    for i, ((part, _), out) in enumerate(zip(parts, outs)):
        rows.append(len(part))
        columns.append(out.numel())
        strides.append(part.stride(0))
        is_many = len(part) >= MANY
        many |= is_many << i
        programs += ceil_div(out.numel(), BLOCK[is_many][1])
    missing = MOST - len(parts)
    # The kernel does not touch those that are not there; pointers have to be there all the same.
    launch(
        partial_sums_kernel, programs, *(part for part, _ in parts), *[parts[0][0]] * missing, *outs,
        *[outs[0]] * missing, *rows, *[0] * missing, *columns, *[0] * missing, *strides, *[0] * missing,
        MANY_ROWS=many, COUNT=len(parts), BLOCK_R=BLOCK[0][0], BLOCK_C=BLOCK[0][1], BLOCK_R_MANY=BLOCK[1][0],
        BLOCK_C_MANY=BLOCK[1][1], num_warps=NUM_WARPS,
    )  # fmt: skip
    return outs
