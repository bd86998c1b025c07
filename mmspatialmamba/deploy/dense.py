"""Single-stage heads: RetinaNet, ATSS, FCOS, RTMDet and all that predict as they do, and GFL."""

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.gfl_head import GFLHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn

from .operators import best, decode, drop, fill, is_wider, rows_of, suppress_within
from .refusals import read_count, read_suppression, require, require_methods


def require_coder(place: str, coder: object) -> None:
    """Raises `CannotExport` unless a box coder is one of those whose clipping is known."""
    known = (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)
    require(place, ' or '.join(one.__name__ for one in known), type(coder).__name__, type(coder) in known)
    require(f'{place}.use_box_type', 'False', coder.use_box_type, not coder.use_box_type)


def require_activation(place: str, head: nn.Module) -> None:
    """Raises `CannotExport` if the loss of a head's classes has an activation of its own."""
    custom = getattr(head.loss_cls, 'custom_cls_channels', False)
    require(f'{place}.loss_cls', 'a loss with sigmoid or softmax', type(head.loss_cls).__name__, not custom)


def scores_of(head: nn.Module, logits: Tensor) -> Tensor:
    """Returns the scores of the classes, (N, classes), of a head's logits."""
    return logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]


def priors_of(head: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Returns the anchors or points of each map."""
    sizes = [x.shape[-2:] for x in maps]
    return head.prior_generator.grid_priors(sizes, dtype=maps[0].dtype, device=maps[0].device)


class DenseDetections(nn.Module):
    """What a single-stage head finds in one image, as `BaseDenseHead.predict` of mmdet.

    Args:
        head: The head; its ``test_cfg`` says how many boxes it keeps.

    Raises:
        CannotExport: The head predicts otherwise, or its ``test_cfg`` asks for what ONNX has not.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        place = 'bbox_head'
        require_methods(place, head, (BaseDenseHead,), ('predict', 'predict_by_feat', '_bbox_post_process'))
        require_methods(place, head, (BaseDenseHead, GFLHead), ('_predict_by_feat_single',))
        require_activation(place, head)
        require_coder(f'{place}.bbox_coder', head.bbox_coder)
        self.head = head
        self.iou = read_suppression('test_cfg', head.test_cfg)
        self.candidates = read_count('test_cfg', head.test_cfg, 'nms_pre')
        self.count = read_count('test_cfg', head.test_cfg, 'max_per_img')
        self.has_distributions = isinstance(head, GFLHead)

    def forward(self, maps: tuple[Tensor, ...], size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes (count, 4), scores (count,) and labels (count,).

        Args:
            maps: The neck's maps of one image.
            size: Height and width of the image before it was padded, (2,).
        """
        head, cfg = self.head, self.head.test_cfg
        classes, offsets, *factors = head(maps)
        factors = factors[0] if factors else [None] * len(classes)
        strides = head.prior_generator.strides
        found = []
        for level in zip(classes, offsets, factors, priors_of(head, classes), strides, strict=True):
            found.append(self._candidates(*level))
        scores, labels, priors, offsets = map(torch.cat, zip(*found, strict=True))
        boxes = decode(head.bbox_coder, priors, offsets, size)
        scores = drop(scores, is_wider(boxes, cfg.get('min_bbox_size', -1)))
        kept = suppress_within(labels, boxes, scores, self.iou, self.count)
        scores, boxes, labels = fill(self.count, scores[kept], boxes[kept], labels[kept])
        return boxes, scores, labels

    def _candidates(self, logits, offsets, factors, priors, stride):
        """Returns the best scores of a level with their labels, priors and offsets."""
        head, cfg = self.head, self.head.test_cfg
        scores = scores_of(head, rows_of(logits, head.cls_out_channels))
        classes = scores.shape[1]
        scores, index = best(scores.reshape(-1), self.candidates)
        row = index // classes
        kept = scores > cfg.get('score_thr', 0)
        if factors is not None:
            scores = scores * rows_of(factors, 1)[:, 0].sigmoid()[row]
        priors = priors[row]
        if self.has_distributions:
            offsets = head.integral(rows_of(offsets, 4 * (head.reg_max + 1))[row]) * stride[0]
            priors = head.anchor_center(priors)
        else:
            offsets = rows_of(offsets, head.bbox_coder.encode_size)[row]
        return drop(scores, kept), index % classes, priors, offsets
