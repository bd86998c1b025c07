"""Shows linear attention, Mamba and a backbone as one matrix each: y = M u over the tokens of a small grid.

Example:
    python tools/visualize_matrix.py configs/mask_rcnn_sm_t.py --checkpoint checkpoints/FILE --image IMAGE --grid 8 8

With step size Δ, input weight B, output weight C and skip weight D of one SSM of the model, for one channel,

    linear attention  M = diag(C) S0 + D I    S0[t, s] = Δ_s B_s for s <= t: the scan without decay
    Mamba             M = diag(C) S  + D I    S [t, s] = exp(A (Δ_{s+1} + … + Δ_t)) Δ_s B_s for s <= t
    Spatial-Mamba     M = diag(C) F S + D I   F: the state fusion, 25 entries a row, replicate padding

Of a VMamba, the first two are those of its first order alone, and

    VMamba            M = sum_k P_k^T diag(C_k) S_k P_k + D I    P_k: the permutation into the sequence of order k

The first two are lower triangular: a token reads only those before it. F makes it read its surroundings, and orders
from all four sides the whole map. All use the same parameters, so that what differs is the matrix alone. The picture
shows M without D I, as the mean absolute value over the inner channels, and the row of the middle token as a map: what
this token reads, and from where.

Each M is built from its formula in float64 and compared with what the op computes of the same input without a skip: the
tool fails if they differ by more than 1e-12 of the largest (M - D I) u.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from mmspatialmamba.ops.state_fusion.taps import TAP_OFFSETS

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.inspection import (
    ScanRecord,
    SSMRecord,
    build_model,
    crop_image,
    normalize,
    picture_path,
    read_config,
    record_ssm,
)

TOLERANCE = 1e-12
"""Largest difference between (M - D I) u and the op, relative to the largest; up to 4e-14 was measured."""

MOST_TOKENS = 1024
CHANNELS_AT_ONCE = 16
DECADES = 4
"""Orders of magnitude that the colours span."""


def mixers(record: SSMRecord | ScanRecord) -> dict[str, SSMRecord | ScanRecord]:
    """Returns the SSM under each of three theories: without decay and fusion or orders, without these, and as it is."""
    if isinstance(record, ScanRecord):
        per_order = {'dt': 3, 'B': 3, 'C': 3, 'dt_weight': 0, 'dt_bias': 0, 'A': 0, 'D': 0}
        first = {name: getattr(record, name).narrow(axis, 0, 1) for name, axis in per_order.items()}
        name, mamba = 'VMamba', replace(record, **first, orders=record.orders[: len(record.orders) // len(record.A)])
    else:
        no_fusion = torch.zeros_like(record.taps)
        no_fusion[TAP_OFFSETS.index((0, 0))] = 1
        name, mamba = 'Spatial-Mamba', replace(record, taps=no_fusion)
    return {
        'linear attention': replace(mamba, A=torch.zeros_like(record.A[: len(mamba.A)])),
        'Mamba': mamba,
        name: record,
    }


def scan_matrix(delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Returns S for each channel, (channels, L, L): the state is h = S u.

    Args:
        delta: Step size of some channels in the sequence of the scan, (L, channels).
        A: Their decay rates, (channels,).
        B: Input weight in the same sequence, (L, 1).
    """
    log_decay = (delta * A).cumsum(0).T
    later = torch.ones(len(delta), len(delta), dtype=torch.bool).triu(1)
    decay = (log_decay[:, :, None] - log_decay[:, None, :]).masked_fill(later, -torch.inf).exp()
    return decay * (delta * B).T[:, None, :]


def fusion_matrix(taps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns F for each channel of the taps, (channels, L, L): the fused state is g = F h."""
    rows, columns = (
        index.flatten() for index in torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    )
    tokens = torch.arange(height * width)
    matrix = taps.new_zeros(taps.shape[1], height * width, height * width)
    for tap, (down, right) in zip(taps, TAP_OFFSETS, strict=True):
        sources = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        matrix[:, tokens, sources] += tap[:, None]
    return matrix


def orders_matrix(record: ScanRecord, channels: torch.Tensor) -> torch.Tensor:
    """Returns the sum over orders and states of P^T diag(C) S P for each of the channels, (channels, L, L)."""
    delta, B, C = (x[0].flatten(0, 1) for x in (record.delta, record.B, record.C))
    matrix = 0
    for k, at in enumerate(record.visits):
        back = at.argsort()
        for s in range(record.A.shape[-1]):
            scan = scan_matrix(delta[at, k][:, channels], record.A[k, channels, s], B[at, k, s, None])
            matrix = matrix + (C[at, k, s, None] * scan)[:, back][:, :, back]
    return matrix


def matrices(record: SSMRecord | ScanRecord) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields some channels at a time, and M without D I for each of them, (channels, L, L)."""
    height, width, count = record.u.shape[1:]
    for channels in torch.arange(count).split(CHANNELS_AT_ONCE):
        if isinstance(record, ScanRecord):
            yield channels, orders_matrix(record, channels)
            continue
        fusion = fusion_matrix(record.taps[:, channels], height, width)
        delta, B, C = (x[0].flatten(0, 1) for x in (record.delta, record.B, record.C))
        yield channels, C * (fusion @ scan_matrix(delta[:, channels], record.A[channels], B))


def summarize(record: SSMRecord | ScanRecord) -> tuple[np.ndarray, float]:
    """Builds M without D I for every channel and compares its product with u with the op, D = 0.

    Args:
        record: Call of the op in float64, with one image.

    Returns:
        Mean absolute value of M without D I over the channels, (L, L), and the largest difference of (M - D I) u from
        the op relative to the largest.
    """
    record = replace(record, D=torch.zeros_like(record.D))
    arguments = [getattr(record, field.name) for field in fields(record) if field.name != 'y']
    op = torch.ops.mmspatialmamba
    call = op.selective_scan.orders if isinstance(record, ScanRecord) else op.structure_aware_ssm
    expected = call(*arguments)[0].flatten(0, 1)
    u = record.u[0].flatten(0, 1)
    read = torch.empty_like(u)
    total = 0
    for channels, matrix in matrices(record):
        total = total + matrix.abs().sum(0)
        read[:, channels] = (matrix @ u.T[channels, :, None])[..., 0].T
    error = (read - expected).abs().max() / read.abs().max()
    return (total / u.shape[1]).numpy(), error.item()


def draw(pictures: dict[str, np.ndarray], height: int, width: int, title: str, path: Path) -> None:
    """Draws the matrices above what the middle token reads, and writes the picture."""
    middle = (height // 2) * width + width // 2
    figure = Figure(figsize=(11, 7.6), layout='constrained')
    figure.suptitle(title, fontsize=10)
    for axes, (name, matrix) in zip(figure.subplots(2, len(pictures)).T, pictures.items(), strict=True):
        for axis, values, label in (
            (axes[0], matrix, 'mean |M|'),
            (axes[1], matrix[middle].reshape(height, width), 'mean |M| in the row of the middle token'),
        ):
            largest = values.max()
            image = axis.imshow(
                np.maximum(values, largest * 10**-DECADES), norm=LogNorm(largest * 10**-DECADES, largest), cmap='magma'
            )
            figure.colorbar(image, ax=axis, shrink=0.8, label=label)
        axes[0].set(title=name, xlabel='token s that is read', ylabel='token t that reads')
        axes[1].plot(width // 2, height // 2, marker='+', color='cyan', markersize=12)
        axes[1].set(xlabel='column of the grid', ylabel='row of the grid')
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config whose backbone is one of this package')
    parser.add_argument('--checkpoint', help='checkpoint of the model; without one, random weights')
    parser.add_argument('--image', type=Path, help='image file; without one, random pixels')
    parser.add_argument(
        '--block', type=int, nargs=2, default=(0, 0), metavar=('STAGE', 'BLOCK'), help='counted from 0 (default 0 0)'
    )
    parser.add_argument(
        '--grid', type=int, nargs=2, default=(8, 8), metavar=('HEIGHT', 'WIDTH'), help='of tokens (default 8 8)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of random weights and pixels')
    parser.add_argument(
        '--out',
        type=picture_path,
        default=Path('work_dirs/matrix.png'),
        help='picture to write',
    )
    args = parser.parse_args()
    height, width = args.grid
    if min(args.grid) < 1 or height * width > MOST_TOKENS:
        parser.error(f'argument --grid: expected 1 to {MOST_TOKENS} tokens, got {height}x{width}')

    block = tuple(args.block)
    try:
        model = build_model(read_config(args.config), args.checkpoint, args.seed)
        strides = getattr(model.backbone, 'STRIDES', (1,))
        stride = strides[min(max(block[0], 0), len(strides) - 1)]
        size = (height * stride, width * stride)
        if args.image:
            image = crop_image(args.image, *size)
        else:
            image = np.random.default_rng(args.seed).integers(0, 256, (*size, 3), np.uint8)
        inputs = normalize(model, image)[..., : size[0], : size[1]]
        record = record_ssm(model.backbone.double(), inputs.double(), [block])[block]
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f'visualize_matrix: {error}')

    pictures, failed = {}, False
    for name, theory in mixers(record).items():
        pictures[name], error = summarize(theory)
        failed |= not error <= TOLERANCE
        print(f'{name}: (M - D I) u differs from the op by {error:.1e} of the largest, allowed is {TOLERANCE:.0e}')
    weights = Path(args.checkpoint).name if args.checkpoint else 'random weights'
    title = (
        f'{Path(args.config).name}, {weights}, stage {block[0]}, block {block[1]}, grid {height}x{width}, D I left out'
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, height, width, title, args.out)
    print(f'wrote {args.out}')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
