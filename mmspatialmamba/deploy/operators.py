"""Suppression and RoIAlign as ops with one ONNX operator each, and how rows are chosen around them.

Runtimes and compilers want counts that are known: the K of every TopK is a constant, and rows that are not there are
padded. A row that was dropped has a score below every threshold.
"""

import torch
import torch.nn.functional as F
from mmcv.ops import roi_align as mmcv_roi_align
from mmcv.ops.nms import NMSop
from onnxscript import ir
from onnxscript import opset18 as op
from torch import Tensor

from ..onnx_export import TRANSLATIONS as MODEL_TRANSLATIONS

DROPPED = -1.0
"""Score of a row that does not count."""

ABOVE_DROPPED = -0.5
"""Threshold of a suppression that takes every row but the dropped ones."""


@torch.library.custom_op('mmspatialmamba_deploy::suppress', mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, threshold: float, count: int) -> Tensor:
    """Suppresses in each group and class by itself, best box first.

    Args:
        boxes: Corners in pixels, (G, N, 4), float32.
        scores: Dimensionless, (G, C, N), float32.
        iou: Overlap above which the worse of two boxes goes.
        threshold: Only boxes with a score above it take part.
        count: Largest number of boxes that a class keeps.

    Returns:
        Group, class and box of each box that is kept, (K, 3), int64.
    """
    kept = [torch.zeros((0, 3), dtype=torch.long, device=boxes.device)]
    for group, classes in enumerate(scores):
        for number, row in enumerate(classes):
            taken = torch.nonzero(row > threshold)[:, 0]
            if len(taken):
                best = taken[NMSop.apply(boxes[group, taken], row[taken], iou, 0, 0.0, count)]
                kept.append(torch.stack([torch.full_like(best, group), torch.full_like(best, number), best], 1))
    return torch.cat(kept)


@suppress.register_fake
def _(boxes, scores, iou, threshold, count):
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.long)


def _translate_suppress(boxes, scores, iou, threshold, count):
    limit, overlap, lowest = (
        op.Constant(value=ir.tensor([value], dtype=dtype))
        for value, dtype in ((count, ir.DataType.INT64), (iou, ir.DataType.FLOAT), (threshold, ir.DataType.FLOAT))
    )
    return op.NonMaxSuppression(boxes, scores, limit, overlap, lowest)


@torch.library.custom_op('mmspatialmamba_deploy::roi_align', mutates_args=())
def roi_align(x: Tensor, boxes: Tensor, height: int, width: int, scale: float, samples: int, aligned: bool) -> Tensor:
    """Averages a map over boxes, as mmcv's RoIAlign does.

    Args:
        x: Map of one image, (1, C, H, W), float32.
        boxes: Corners in pixels of the image, (K, 4), float32.
        height: Rows of the result.
        width: Columns of the result.
        scale: Pixels of the map per pixel of the image.
        samples: Samples per cell and axis; 0 for as many as a cell has pixels.
        aligned: Whether pixel centres lie at halves.

    Returns:
        (K, C, height, width), float32.
    """
    return mmcv_roi_align(x, F.pad(boxes, (1, 0)), (height, width), scale, samples, 'avg', aligned)


@roi_align.register_fake
def _(x, boxes, height, width, scale, samples, aligned):
    return x.new_empty((boxes.shape[0], x.shape[1], height, width))


def _translate_roi_align(x, boxes, height, width, scale, samples, aligned):
    image = op.Cast(op.Mul(op.Squeeze(op.Slice(boxes, [0], [1], [1]), [1]), 0.0), to=ir.DataType.INT64)
    return op.RoiAlign(
        x,
        boxes,
        image,
        output_height=height,
        output_width=width,
        sampling_ratio=samples,
        spatial_scale=scale,
        mode='avg',
        coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
    )


TRANSLATIONS = {
    **MODEL_TRANSLATIONS,
    torch.ops.mmspatialmamba_deploy.suppress.default: _translate_suppress,
    torch.ops.mmspatialmamba_deploy.roi_align.default: _translate_roi_align,
}
"""For ``custom_translation_table`` of `torch.onnx.export`."""


def rows_of(x: Tensor, channels: int) -> Tensor:
    """Returns a map (1, A·channels, H, W) as rows (H·W·A, channels), in the order of mmdet's priors."""
    return x[0].permute(1, 2, 0).reshape(-1, channels)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the ``count`` best scores and their rows; where there are fewer, `DROPPED` and the last row.

    Args:
        scores: (N,) with N at least 1.
        count: Number of rows.
    """
    last = scores.shape[0] - 1
    scores, index = torch.topk(F.pad(scores, (0, count), value=DROPPED), count)
    return scores, index.clamp(max=last)


def fill(count: int, scores: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Returns the ``count`` best rows in order; where there are fewer, rows of zeros.

    With as many rows as detections OpenVINO 2026.4.1 goes wrong, silently, from the third image on.

    Args:
        count: Number of rows.
        scores: (N,) at least 0.
        others: What goes with the scores, (N, ...).
    """
    scores, *others = (F.pad(x, (*[0, 0] * (x.ndim - 1), 0, count)) for x in (scores, *others))
    scores, order = torch.topk(scores, count)
    return scores, *(x[order] for x in others)


def drop(scores: Tensor, kept: Tensor) -> Tensor:
    """Returns the scores with `DROPPED` in all rows that are not kept."""
    return torch.where(kept, scores, torch.full_like(scores, DROPPED))


def is_wider(boxes: Tensor, size: float) -> Tensor:
    """Returns whether both sides of each box are above a size in pixels, (N,); all are where the size is below 0."""
    if size < 0:
        return torch.ones_like(boxes[:, 0], dtype=torch.bool)
    return (boxes[:, 2:] - boxes[:, :2] > size).all(-1)


def suppress_within(groups: Tensor, boxes: Tensor, scores: Tensor, iou: float, count: int) -> Tensor:
    """Suppresses boxes by better ones of their group, and returns the rows of the ``count`` best that are left.

    The groups are moved apart as mmcv does it, with the same arithmetic, so that the same boxes survive.

    Args:
        groups: Class or level of each box, (N,), int64.
        boxes: Corners in pixels, (N, 4).
        scores: (N,); rows with `DROPPED` take no part.
        iou: Overlap above which the worse of two boxes goes.
        count: Largest number of rows.
    """
    kept = scores > ABOVE_DROPPED
    largest = torch.where(kept[:, None], boxes, torch.zeros_like(boxes)).max()
    apart = boxes + (groups.to(boxes) * (largest + 1))[:, None]
    return suppress(apart[None], scores[None, None], iou, ABOVE_DROPPED, count)[:, 2]


def decode(coder, priors: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    """Returns boxes (N, 4) in pixels as the coder decodes them, clipped to the image if it clips.

    Args:
        coder: A box coder of mmdet.
        priors: Anchors (N, 4) or points (N, 2).
        offsets: What the head says of each, (N, 4).
        size: Height and width of the image before it was padded, (2,).
    """
    boxes = coder.decode(priors, offsets)
    if not coder.clip_border:
        return boxes
    return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2))
