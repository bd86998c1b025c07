"""Two-stage detectors: the RPN, and the second stages of Faster, Mask and Cascade R-CNN with boxes and masks."""

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from mmdet.models.roi_heads.cascade_roi_head import CascadeRoIHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.roi_heads.standard_roi_head import StandardRoIHead
from torch import Tensor, nn

from .dense import priors_of, require_activation, require_coder, scores_of
from .operators import ABOVE_DROPPED, best, decode, drop, fill, is_wider, roi_align, rows_of, suppress, suppress_within
from .refusals import read_count, read_suppression, require, require_methods, require_type


class Proposals(nn.Module):
    """What an RPN proposes in one image, as `RPNHead.predict` of mmdet.

    Raises:
        CannotExport: The head predicts otherwise, or its ``test_cfg`` asks for what ONNX has not.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        place = 'rpn_head'
        names = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
        require_methods(place, head, (RPNHead,), names)
        require_coder(f'{place}.bbox_coder', head.bbox_coder)
        self.head = head
        self.iou = read_suppression('test_cfg.rpn', head.test_cfg)
        self.candidates = read_count('test_cfg.rpn', head.test_cfg, 'nms_pre')
        self.count = read_count('test_cfg.rpn', head.test_cfg, 'max_per_img')

    def forward(self, maps: tuple[Tensor, ...], size: Tensor) -> tuple[Tensor, Tensor]:
        """Returns boxes (count, 4), best first, and whether each is one, (count,)."""
        head = self.head
        classes, offsets = head(maps)
        found = []
        for level, (c, d, p) in enumerate(zip(classes, offsets, priors_of(head, classes), strict=True)):
            scores, row = best(scores_of(head, rows_of(c, head.cls_out_channels))[:, 0], self.candidates)
            found.append((scores, torch.full_like(row, level), p[row], rows_of(d, 4)[row]))
        scores, levels, priors, offsets = map(torch.cat, zip(*found, strict=True))
        boxes = decode(head.bbox_coder, priors, offsets, size)
        scores = drop(scores, is_wider(boxes, head.test_cfg.get('min_bbox_size', -1)))
        kept = suppress_within(levels, boxes, scores, self.iou, self.count)
        scores, boxes = fill(self.count, scores[kept], boxes[kept])
        return boxes, scores > 0


class Extractor(nn.Module):
    """`SingleRoIExtractor` of mmdet: each box from the map of its size."""

    def __init__(self, place: str, extractor: nn.Module):
        super().__init__()
        require_type(place, extractor, SingleRoIExtractor)
        for layer in extractor.roi_layers:
            require_type(f'{place}.roi_layer', layer, RoIAlign)
            require(f'{place}.roi_layer.pool_mode', 'avg', layer.pool_mode, layer.pool_mode == 'avg')
        self.extractor = extractor

    def forward(self, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        """Returns what lies in the boxes, (K, C, height, width)."""
        layers = self.extractor.roi_layers
        maps = maps[: len(layers)]
        levels = self.extractor.map_roi_levels(nn.functional.pad(boxes, (1, 0)), len(maps))
        rows, parts = [], []
        for level, (layer, x) in enumerate(zip(layers, maps, strict=True)):
            row = torch.nonzero(levels == level)[:, 0]
            rows.append(row)
            height, width = layer.output_size
            options = (height, width, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
            parts.append(roi_align(x, boxes[row], *options))
        rows = torch.cat(rows)
        order = torch.zeros_like(levels).index_put((rows,), torch.arange(rows.shape[0], device=rows.device))
        return torch.cat(parts)[order]


class BoxStage(nn.Module):
    """One box head of a second stage with its extractor."""

    def __init__(self, place: str, head: nn.Module, extractor: nn.Module):
        super().__init__()
        names = ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class')
        require_methods(f'{place}.bbox_head', head, (BBoxHead,), names)
        require(f'{place}.bbox_head', 'classes and boxes', 'one alone', head.with_cls and head.with_reg)
        require_activation(f'{place}.bbox_head', head)
        require_coder(f'{place}.bbox_head.bbox_coder', head.bbox_coder)
        self.head = head
        self.extract = Extractor(f'{place}.bbox_roi_extractor', extractor)
        self.groups = 1 if head.reg_class_agnostic else head.num_classes

    def forward(self, maps: tuple[Tensor, ...], boxes: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (K, classes + 1) and boxes (K, groups, 4), one for each class or one for all."""
        logits, offsets = self.head(self.extract(maps, boxes))
        priors = boxes[:, None].expand(-1, self.groups, 4).reshape(-1, 4)
        boxes = decode(self.head.bbox_coder, priors, offsets.reshape(-1, 4), size)
        return logits, boxes.reshape(-1, self.groups, 4)


class MaskStage(nn.Module):
    """One mask head of a second stage with its extractor."""

    def __init__(self, place: str, head: nn.Module, extractor: nn.Module):
        super().__init__()
        require_methods(f'{place}.mask_head', head, (FCNMaskHead,), ('predict_by_feat', '_predict_by_feat_single'))
        self.head = head
        self.extract = Extractor(f'{place}.mask_roi_extractor', extractor)

    def forward(self, maps: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Returns the probabilities of each box's class, (K, height, width)."""
        masks = self.head(self.extract(maps, boxes)).sigmoid()
        if self.head.class_agnostic:
            return masks[:, 0]
        return masks[torch.arange(masks.shape[0], device=masks.device), labels]


class TwoStageDetections(nn.Module):
    """What a two-stage detector finds in one image, as its ``predict`` in mmdet.

    Args:
        rpn: The RPN.
        roi_head: The second stage; its ``test_cfg`` says how many boxes it keeps.

    Raises:
        CannotExport: One of them predicts otherwise, or a ``test_cfg`` asks for what ONNX has not.
    """

    def __init__(self, rpn: nn.Module, roi_head: nn.Module):
        super().__init__()
        self.propose = Proposals(rpn)
        place, cfg = 'roi_head', roi_head.test_cfg
        owners = (StandardRoIHead, CascadeRoIHead)
        names = ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward')
        require_methods(place, roi_head, owners, names)
        shared = roi_head.with_shared_head
        require(place, 'no shared_head', type(roi_head.shared_head).__name__ if shared else None, not shared)
        self.iou = read_suppression('test_cfg.rcnn', cfg)
        self.threshold = max(cfg.score_thr, ABOVE_DROPPED)
        self.count = read_count('test_cfg.rcnn', cfg, 'max_per_img')
        self.boxes = self._stages(BoxStage, roi_head.bbox_head, roi_head.bbox_roi_extractor)
        self.masks = None
        if roi_head.with_mask:
            threshold = cfg.mask_thr_binary
            require('test_cfg.rcnn.mask_thr_binary', 'a threshold of at least 0', threshold, threshold >= 0)
            self.masks = self._stages(MaskStage, roi_head.mask_head, roi_head.mask_roi_extractor)

    @staticmethod
    def _stages(kind: type, heads: nn.Module, extractors: nn.Module) -> nn.ModuleList:
        if not isinstance(heads, nn.ModuleList):
            return nn.ModuleList([kind('roi_head', heads, extractors)])
        pairs = zip(heads, extractors, strict=True)
        return nn.ModuleList([kind(f'roi_head stage {index}', *pair) for index, pair in enumerate(pairs)])

    def forward(self, maps: tuple[Tensor, ...], size: Tensor) -> tuple[Tensor, ...]:
        """Returns boxes (count, 4), scores (count,), labels (count,) and, with a mask head, masks (count, h, w).

        Args:
            maps: The neck's maps of one image.
            size: Height and width of the image before it was padded, (2,).
        """
        boxes, exist = self.propose(maps, size)
        logits = []
        for index, stage in enumerate(self.boxes):
            found, regressed = stage(maps, boxes, size)
            logits.append(found)
            if index < len(self.boxes) - 1:
                boxes = self._refine(stage, found, regressed)
        boxes, scores, labels = self._classify(sum(logits) / len(logits), regressed, exist)
        if self.masks is None:
            return boxes, scores, labels
        masks = [stage(maps, boxes, labels) for stage in self.masks]
        return boxes, scores, labels, sum(masks) / len(masks)

    @staticmethod
    def _refine(stage: BoxStage, logits: Tensor, boxes: Tensor) -> Tensor:
        """Returns the box of the best class, (K, 4), of boxes (K, groups, 4)."""
        if stage.groups == 1:
            return boxes[:, 0]
        return boxes[torch.arange(boxes.shape[0], device=boxes.device), logits[:, :-1].argmax(1)]

    def _classify(self, logits: Tensor, boxes: Tensor, exist: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes, scores and labels of logits (K, classes + 1) and boxes (K, groups, 4) that exist, (K,)."""
        scores = drop(logits.softmax(-1)[:, :-1], exist[:, None]).permute(1, 0)
        boxes = boxes.permute(1, 0, 2)
        per_class = self.boxes[-1].groups > 1
        kept = suppress(boxes, scores[:, None] if per_class else scores[None], self.iou, self.threshold, self.count)
        group, number, row = kept.unbind(1)
        labels = group if per_class else number
        scores, boxes, labels = fill(self.count, scores[labels, row], boxes[group, row], labels)
        return boxes, scores, labels
