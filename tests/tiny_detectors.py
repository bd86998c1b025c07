"""Detectors of mmdet with a small backbone and small heads, whose random weights find things and saturate nothing."""

from types import SimpleNamespace

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.hub import get_config
from mmengine.registry import DefaultScope

CHANNELS = 32
CLASSES = 5

BOX = {'in_channels': CHANNELS, 'fc_out_channels': 32, 'num_classes': CLASSES}
MASK = {'num_convs': 1, 'in_channels': CHANNELS, 'conv_out_channels': 16, 'num_classes': CLASSES}
DENSE = {'in_channels': CHANNELS, 'feat_channels': CHANNELS, 'stacked_convs': 1, 'num_classes': CLASSES}

CONFIGS = {
    'mask_rcnn': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'faster_rcnn': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'class_agnostic': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_mask_rcnn': 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn': 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'retinanet': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'atss': 'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'fcos': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'gfl': 'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    'rtmdet': 'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
}
"""Every head that a whole file holds, by name."""


def tiny_config(name: str, max_per_img: int = 20, **test_cfg):
    """Returns the model's config; ``test_cfg`` overrides that of the last stage."""
    cfg = get_config(CONFIGS[name]).model
    two_stage = 'roi_head' in cfg
    first = 0 if two_stage else 1
    cfg.backbone = {
        'type': 'mmspatialmamba.SpatialMamba',
        'arch': {'embed_dims': 8, 'depths': (1, 1, 1, 1)},
        'out_indices': tuple(range(first, 4)),
    }
    levels = 3 if name == 'rtmdet' else 5
    cfg.neck = {'type': 'FPN', 'in_channels': [8, 16, 32, 64][first:], 'out_channels': CHANNELS, 'num_outs': levels}
    if name != 'rtmdet':
        cfg.neck['add_extra_convs'] = False if two_stage else 'on_input'
    cfg.train_cfg = None
    if two_stage:
        cfg.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
        head = cfg.roi_head
        for extractor in ('bbox_roi_extractor', 'mask_roi_extractor'):
            if extractor in head:
                head[extractor].out_channels = CHANNELS
        boxes = head.bbox_head if isinstance(head.bbox_head, list) else [head.bbox_head]
        for box in boxes:
            box.update(BOX)
        if 'mask_head' in head:
            head.mask_head.update(MASK)
        if name == 'class_agnostic':
            head.bbox_head.reg_class_agnostic = True
            head.mask_head.class_agnostic = True
        cfg.test_cfg.rpn.update(nms_pre=200, max_per_img=50)
        cfg.test_cfg.rcnn.update(max_per_img=max_per_img, score_thr=0.1, **test_cfg)
    else:
        cfg.bbox_head.update(DENSE)
        cfg.test_cfg.update(nms_pre=200, max_per_img=max_per_img, score_thr=0.1, **test_cfg)
    return cfg


def tiny_detector(name: str, **overrides):
    """Builds a detector with random weights."""
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(tiny_config(name, **overrides)).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Returns a smooth random picture, (1, 3, H, W), float32, 0 to 255."""
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 255).round()


@torch.no_grad()
def predict(model, image: torch.Tensor):
    """Returns what mmdet finds in a picture, as NumPy arrays."""
    sample = DetDataSample()
    size = tuple(image.shape[2:])
    sample.set_metainfo({'img_shape': size, 'ori_shape': size, 'scale_factor': (1.0, 1.0)})
    data = model.data_preprocessor({'inputs': [image[0]], 'data_samples': [sample]}, False)
    (result,) = model.predict(data['inputs'], data['data_samples'], rescale=True)
    found = result.pred_instances.numpy()
    return SimpleNamespace(boxes=found.bboxes, scores=found.scores, labels=found.labels, masks=found.get('masks'))
