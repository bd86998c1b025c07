"""Draws the effective receptive field of backbones, side by side, stage by stage, before and after training.

Example:
    python tools/visualize_erf.py data/coco/val2017 --size 512 512 --max-images 20 \\
        --model Spatial-Mamba-T configs/mask_rcnn_sm_t.py checkpoints/FILE \\
        --model Swin-T mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\
        --model ResNet-50 mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py

For each map that a backbone returns, the field is how much every pixel contributes to the position in the middle: the
absolute gradient of that position's positive features, summed over image channels, averaged over the images (Luo et
al., arXiv 1701.04128; the sum of positive features instead of all is that of RepLKNet, arXiv 2203.06717, and matters
because the features of a LayerNorm sum to a constant). Its size is the area of the smallest square that holds 20, 50
or 99 % of all contribution, around the field's own middle: where the strided layers of a network look differs by up to
half a stride. A model without CHECKPOINT has random weights; with one it is drawn before (random weights) and after.
Random weights are those that the toolbox would train from: mmdet's ResNet has residual branches of zero then, so that
its field is that of its shortcuts. Writes a picture and, beside it, a CSV file.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.utils import track_iter_progress
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.inspection import build_model, crop_image, normalize, picture_path, read_config

SHARES = {0.2: 'white', 0.5: 'cyan', 0.99: 'lime'}
"""Shares of the contribution whose area is measured, and the colours of their squares."""

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')
FLOOR = 1e-4
"""Contributions below this part of the largest have the darkest colour."""


@dataclass(frozen=True)
class Field:
    """Effective receptive field of one position of one map.

    Attributes:
        contribution: Mean absolute gradient of each input pixel, (H, W).
        stride: Pixels of the image for each row of the map.
    """

    contribution: np.ndarray
    stride: int

    @property
    def middle(self) -> tuple[int, int]:
        """Row and column, in pixels, that have half of the contribution before them."""
        halves = (np.cumsum(self.contribution.sum(axis)) for axis in (1, 0))
        return tuple(int(np.searchsorted(held, held[-1] / 2)) for held in halves)

    def square(self, share: float) -> tuple[int, float]:
        """Returns the smallest square around the middle that holds a share of all contribution.

        Args:
            share: Share of the sum of all contributions, from 0 to 1.

        Returns:
            Its side in pixels, and the area of its part inside the image as a share of the image's area.
        """
        rows, columns = (
            np.abs(np.arange(size) - middle) for size, middle in zip(self.contribution.shape, self.middle, strict=True)
        )
        ring = np.maximum(rows[:, None], columns[None, :])
        held = np.cumsum(np.bincount(ring.ravel(), self.contribution.ravel()))
        radius = min(int(np.searchsorted(held, share * held[-1])), len(held) - 1)
        return 2 * radius + 1, float((ring <= radius).mean())


def receptive_fields(model: nn.Module, images: list[Path], height: int, width: int) -> list[Field]:
    """Measures the effective receptive field of the middle position of each map of a model's backbone.

    Args:
        model: Model in evaluation mode, with ``backbone`` and ``data_preprocessor``.
        images: Image files.
        height: Height in pixels to which each image is brought.
        width: The width.

    Raises:
        ValueError: A file is no image, or the backbone does not run at this size.
    """
    model.requires_grad_(False)
    sums, strides = [], []
    for path in track_iter_progress(images):
        inputs = normalize(model, crop_image(path, height, width)).requires_grad_()
        try:
            maps = model.backbone(inputs)
        except RuntimeError as error:
            raise ValueError(f'expected a backbone that runs at {height}x{width}, found {error}') from error
        if not sums:
            sums = [np.zeros((height, width)) for _ in maps]
            strides = [round(inputs.shape[2] / features.shape[2]) for features in maps]
        for index, features in enumerate(maps):
            row, column = (size // 2 // strides[index] for size in (height, width))
            score = features[0, :, row, column].relu().sum()
            (gradient,) = torch.autograd.grad(score, inputs, retain_graph=index < len(maps) - 1)
            sums[index] += gradient[0].abs().sum(0)[:height, :width].numpy()
    print()
    return [Field(total / len(images), stride) for total, stride in zip(sums, strides, strict=True)]


def draw(rows: list[tuple[str, list[Field]]], path: Path) -> None:
    """Draws a row of fields for each model, with the squares of ``SHARES``, and writes the picture."""
    columns = max(len(fields) for _, fields in rows)
    height, width = rows[0][1][0].contribution.shape
    figure = Figure(figsize=(2.8 * columns + 1.2, (2.8 * height / width + 0.5) * len(rows) + 0.7), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (label, fields) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(f'{label}\nrow, px', fontsize=9)
        for axis in axes[len(fields) :]:
            axis.set_axis_off()
        for axis, field in zip(axes, fields, strict=False):
            relative = np.maximum(field.contribution / field.contribution.max(), FLOOR)
            image = axis.imshow(relative, norm=LogNorm(FLOOR, 1), cmap='inferno')
            areas = []
            for share, colour in SHARES.items():
                side, area = field.square(share)
                row, column = (middle - side / 2 for middle in field.middle)
                square = Rectangle((column, row), side, side, fill=False, edgecolor=colour)
                axis.add_patch(square)
                areas.append(f'{100 * area:.2g}')
            axis.set_title(f'stride {field.stride}: {" / ".join(areas)} % of the area', fontsize=8)
            axis.tick_params(labelsize=7)
    for axis in grid[-1]:
        axis.set_xlabel('column, px', fontsize=9)
    colorbar = figure.colorbar(image, ax=grid, aspect=50, label='contribution, share of the largest')
    colorbar.ax.tick_params(labelsize=7)
    squares = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour) for colour in SHARES.values()]
    names = [f'{100 * share:.0f} % of the contribution' for share in SHARES]
    figure.legend(
        squares, names, loc='outside lower center', ncols=len(SHARES), facecolor='0.2', labelcolor='white', fontsize=9
    )
    figure.savefig(path, dpi=100)


def write_csv(rows: list[tuple[str, list[Field]]], path: Path) -> None:
    """Writes side and area of each square as a table, a line for each model, map and share."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['model', 'stride', 'contribution_percent', 'side_px', 'area_percent'])
        for label, fields in rows:
            for field in fields:
                for share in SHARES:
                    side, area = field.square(share)
                    writer.writerow([label, field.stride, f'{100 * share:.0f}', side, f'{100 * area:.3f}'])


def find_images(folder: Path, most: int) -> list[Path]:
    """Returns the first images of a folder, by name.

    Raises:
        ValueError: There is none.
    """
    found = sorted(path for path in folder.glob('*') if path.suffix.lower() in SUFFIXES)[:most]
    if not found:
        raise ValueError(f'{folder}: expected a folder of images ({", ".join(SUFFIXES)}), found none')
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder of images')
    parser.add_argument(
        '--model', nargs='+', action='append', required=True, metavar=('LABEL', 'CONFIG'),
        help='LABEL CONFIG [CHECKPOINT]: a row, or two with a checkpoint; CONFIG is a file or a name such as mmdet::…',
    )  # fmt: skip
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512), metavar=('HEIGHT', 'WIDTH'), help='in pixels')
    parser.add_argument('--max-images', type=int, default=20, help='number of images to average over (default 20)')
    parser.add_argument('--seed', type=int, default=0, help='of random weights')
    parser.add_argument(
        '--out',
        type=picture_path,
        default=Path('work_dirs/erf.png'),
        help='picture to write; the table lies beside it',
    )
    args = parser.parse_args()
    for model in args.model:
        if len(model) not in (2, 3):
            parser.error(f'argument --model: expected LABEL CONFIG [CHECKPOINT], got {" ".join(model)}')
    if len({label for label, *_ in args.model}) < len(args.model):
        parser.error('argument --model: expected a LABEL of its own for each model')
    if min(*args.size, args.max_images) < 1:
        parser.error(f'expected at least 1 image of at least 1x1 pixel, got {args.max_images} of {args.size}')

    rows = []
    try:
        images = find_images(args.images, args.max_images)
        models = {}
        for label, name, *checkpoints in args.model:
            config = read_config(name)
            for checkpoint in (None, *checkpoints):
                row = f'{label}, {"trained" if checkpoint else "random weights"}'
                models[row] = build_model(config, checkpoint, args.seed)
        for row, model in models.items():
            print(row)
            rows.append((row, receptive_fields(model, images, *args.size)))
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f'visualize_erf: {error}')
    table = args.out.with_suffix('.csv')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, args.out)
    write_csv(rows, table)
    print(table.read_text(), end='')
    print(f'wrote {args.out} and {table}')


if __name__ == '__main__':
    main()
