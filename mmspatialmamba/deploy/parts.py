"""What a model computes from a normalized image batch: its backbone, its head, logits, label maps and scores."""

from collections.abc import Callable

import torch
from torch import nn

PARTS = ('backbone', 'head')


class Exported(nn.Module):
    """A model's computation from a normalized image batch to a tuple of tensors.

    Args:
        model: Where the weights are.
        compute: Maps model and image batch (N, C, H, W) to a tensor or a nest of sequences of tensors.
    """

    def __init__(self, model: nn.Module, compute: Callable):
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the outputs as a flat tuple."""
        return tuple(_flatten(self.compute(self.model, images)))


def _flatten(outputs: torch.Tensor | list | tuple) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flatten(part)]


def is_detector(model: nn.Module) -> bool:
    """Returns whether a model is a detector of mmdet."""
    return not hasattr(model, 'encode_decode') and hasattr(model, 'with_bbox')


def compute_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns a segmentor's logits at the size of the images, (N, classes, H, W)."""
    return model.encode_decode(images, [{'img_shape': images.shape[2:]}])  # it reads the first image's alone


def compute_label_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns a segmentor's labels at the size of the images, (N, H, W), int64, as its ``postprocess_result`` does."""
    logits = compute_logits(model, images)
    if model.out_channels == 1:
        return (logits[:, 0].sigmoid() > model.decode_head.threshold).long()
    return logits.argmax(1)


def compute_dense_head(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """Returns what a detector's RPN or single-stage head computes: a list over the maps for each kind of output."""
    head = model.rpn_head if getattr(model, 'with_rpn', False) else model.bbox_head
    return head(model.extract_feat(images))


def compute_class_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns a classifier's logits, (N, classes)."""
    return model(images, mode='tensor')


def compute_class_scores(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns a classifier's scores, (N, classes), which add up to 1."""
    return compute_class_logits(model, images).softmax(1)


def choose_part(model: nn.Module, part: str | None, argmax: bool = False) -> tuple[Exported, str]:
    """Returns what to export of a model, and the stem of the outputs' names.

    Args:
        model: A model of mmdet, mmseg or mmpretrain.
        part: 'backbone', 'head', or None for the whole of a segmentor or a classifier.
        argmax: Whether a segmentor ends in a label map.
    """
    if part == 'backbone':
        return Exported(model, lambda model, images: model.backbone(images)), 'map'
    if hasattr(model, 'encode_decode'):
        return Exported(model, compute_label_map if argmax else compute_logits), 'labels' if argmax else 'logits'
    if is_detector(model):
        return Exported(model, compute_dense_head), 'dense'
    if part == 'head':
        return Exported(model, compute_class_logits), 'logits'
    return Exported(model, compute_class_scores), 'scores'
