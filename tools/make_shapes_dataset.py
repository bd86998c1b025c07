"""Generates a small data set of circles, squares and triangles, as COCO, as ADE20K, and as images beside masks.

Example:
    python tools/make_shapes_dataset.py data/shapes --train 320 --val 64

writes ``data/shapes/coco`` (as ``data/coco``: train2017, val2017, annotations), ``data/shapes/ade`` (as
``data/ade/ADEChallengeData2016``: images and annotations, training and validation) and ``data/shapes/masks`` (images
and masks, train and val: what ``docs/own_segmentation.md`` is about). The same arguments give the same files; a folder
that is complete already is kept.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from mmengine.utils import track_iter_progress

CLASSES = ('circle', 'square', 'triangle')
SPLITS = {'train': ('train2017', 'training'), 'val': ('val2017', 'validation')}
LAYOUTS = ['coco', 'ade', 'masks']
ADE_BACKGROUND = 1
"""ADE20K's label 0 is "unlabelled", so the background is 1 and class c is c + 2. In masks all are one less."""


def outline(shape: str, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Returns the corners of a shape as a polygon, (K, 2), in pixels."""
    corners = {'circle': 24, 'square': 4, 'triangle': 3}[shape]
    angles = angle + np.arange(corners) * 2 * np.pi / corners
    return centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)


def draw_image(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]], np.ndarray]:
    """Draws one to four shapes that do not touch on a noisy background.

    Returns:
        The image (height, width, 3) in uint8, the shapes as (class index, polygon), and the label map (height, width).
    """
    coarse = rng.uniform(0, 255, (4, 5, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.5 + 60
    labels = np.full((height, width), ADE_BACKGROUND, np.uint8)
    shapes, circles = [], []
    for _ in range(rng.integers(1, 5)):
        radius = rng.uniform(10, 28)
        centre = rng.uniform((radius + 1, radius + 1), (width - radius - 1, height - radius - 1))
        if any(np.hypot(*(centre - other)) < radius + other_radius + 2 for other, other_radius in circles):
            continue
        circles.append((centre, radius))
        index = int(rng.integers(len(CLASSES)))
        polygon = outline(CLASSES[index], centre, radius, rng.uniform(0, 2 * np.pi))
        corners = np.round(polygon).astype(np.int32)
        colour = rng.uniform(0, 255, 3)
        cv2.fillPoly(image, [corners], colour.tolist())
        cv2.fillPoly(labels, [corners], index + 2)
        shapes.append((index, polygon))
    noise = rng.normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), shapes, labels


def write_split(root: Path, split: str, count: int, seed: int, height: int, width: int) -> None:
    """Writes ``count`` images of one split in all layouts under ``root``."""
    coco_name, ade_name = SPLITS[split]
    folders = (
        root / 'coco' / coco_name,
        root / 'coco' / 'annotations',
        root / 'ade' / 'images' / ade_name,
        root / 'ade' / 'annotations' / ade_name,
        root / 'masks' / 'images' / split,
        root / 'masks' / 'masks' / split,
    )
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    coco_images, _, ade_images, ade_labels, mask_images, masks = folders
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in track_iter_progress(list(range(1, count + 1))):
        image, shapes, labels = draw_image(rng, height, width)
        stem = f'{image_id:012d}'
        for folder in (coco_images, ade_images, mask_images):
            cv2.imwrite(str(folder / f'{stem}.jpg'), image)
        cv2.imwrite(str(ade_labels / f'{stem}.png'), labels)
        cv2.imwrite(str(masks / f'{stem}.png'), labels - ADE_BACKGROUND)
        images.append({'id': image_id, 'file_name': f'{stem}.jpg', 'height': height, 'width': width})
        for index, polygon in shapes:
            low, high = polygon.min(0), polygon.max(0)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': index + 1,
                    'bbox': [*low.tolist(), *(high - low).tolist()],
                    'area': float(cv2.contourArea(polygon.astype(np.float32))),
                    'segmentation': [polygon.flatten().tolist()],
                    'iscrowd': 0,
                }
            )
    categories = [{'id': index + 1, 'name': name} for index, name in enumerate(CLASSES)]
    path = root / 'coco' / 'annotations' / f'instances_{coco_name}.json'
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='folder to write')
    parser.add_argument('--train', type=int, default=320, help='number of training images')
    parser.add_argument('--val', type=int, default=64, help='number of validation images')
    parser.add_argument('--size', type=int, nargs=2, default=(128, 160), metavar=('HEIGHT', 'WIDTH'), help='in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.val < 1 or min(args.size) < 64:
        parser.error('expected at least 1 training and 1 validation image and a size of at least 64 pixels')

    settings = {'train': args.train, 'val': args.val, 'size': list(args.size), 'seed': args.seed, 'layouts': LAYOUTS}
    complete = args.root / 'complete.json'
    if complete.exists():
        found = json.loads(complete.read_text())
        if found == settings:
            print(f'{args.root} is complete already')
            return
        sys.exit(f'{args.root}: expected an empty folder or the data of {settings}, found the data of {found}')
    partial = args.root.with_name(args.root.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for index, split in enumerate(SPLITS):
        write_split(partial, split, getattr(args, split), 2 * args.seed + index, *args.size)
    (partial / complete.name).write_text(json.dumps(settings))
    partial.rename(args.root)
    print(f'\nwrote {args.root}')


if __name__ == '__main__':
    main()
