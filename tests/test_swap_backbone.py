"""The helper that puts Spatial-Mamba into configs of the toolboxes: what it changes, runs and refuses."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope

from mmspatialmamba import swap_backbone
from mmspatialmamba.backbone_swap import REFUSED
from mmspatialmamba.normalization import MEAN, STD
from mmspatialmamba.whole_model import WholeModelOptimWrapperConstructor

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
import sweep_zoo

MESSAGES = 'mmspatialmamba.normalization.print_log'
SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}


def zoo(name):
    """Reads a config of a toolbox, named as in ``mmdet::family/config.py``."""
    toolbox, _, path = name.partition('::')
    return Config.fromfile(sweep_zoo.configs_of(toolbox) / path)


def values(config, paths):
    """The values at dotted paths, with tuples as lists."""
    found = {}
    for path in paths:
        value = config
        for key in path.split('.'):
            value = value[int(key)] if key.isdigit() else value[key]
        found[path] = list(value) if isinstance(value, tuple) else value
    return found


@contextlib.contextmanager
def said():
    """Collects what is logged about the normalization of images."""
    messages = []
    with mock.patch(MESSAGES, lambda text, logger, level: messages.append(text)):
        yield messages


CHANGES = {
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': {
        'backbone.out_indices': [0, 1, 2, 3],
        'neck.in_channels': [64, 128, 256, 512],
        'neck.out_channels': 256,
    },
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': {
        'backbone.out_indices': [1, 2, 3],
        'neck.in_channels': [512, 256, 128],
    },
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py': {'neck.in_channels': 512},
    'mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py': {
        'backbone.out_indices': [3],
        'neck.in_channels': [512],
    },
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py': {
        'backbone.out_indices': [2, 3],
        'neck.in_channels': [256, 512],
        'neck.out_channels': [256, 512, 512, 256, 256, 128],
        'bbox_head.in_channels': [256, 512, 512, 256, 256, 128],
    },
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': {
        'panoptic_head.in_channels': [64, 128, 256, 512],
        'panoptic_head.strides': [4, 8, 16, 32],
    },
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py': {
        'backbone.out_indices': [2],
        'neck.in_channels': [256],
        'neck.out_channels': 1024,
        'rpn_head.in_channels': 1024,
        'roi_head.bbox_roi_extractor.out_channels': 1024,
        'roi_head.bbox_head.in_channels': 2048,
    },
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py': {
        'backbone.out_indices': [2],
        'neck.in_channels': [256],
        'neck.out_channels': 2048,
    },
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': {
        'backbone.out_indices': [2, 3],
        'decode_head.in_channels': 512,
        'auxiliary_head.in_channels': 256,
        'pretrained': None,
    },
    'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py': {
        'decode_head.in_channels': 512,
        'decode_head.c1_in_channels': 64,
    },
    'mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py': {  # its head reads the last of the maps it is given
        'backbone.out_indices': [2, 3],
        'decode_head.in_channels': [512],
        'decode_head.in_index': [1],
        'auxiliary_head.in_index': 0,
    },
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py': {'decode_head.in_channels': [128, 256, 512]},
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': {
        'decode_head.in_channels': [64, 128, 256, 512],
        'decode_head.strides': [4, 8, 16, 32],
    },
    'mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py': {
        'decode_head.kernel_generate_head.in_channels': 512,
        'decode_head.kernel_update_head.0.in_channels': 512,
        'auxiliary_head.in_channels': 256,
    },
    'mmseg::ocrnet/ocrnet_r101-d8_8xb2-40k_cityscapes-512x1024.py': {
        'decode_head.0.in_channels': [256, 512],
        'decode_head.1.in_channels': [256, 512],
        'decode_head.0.in_index': [0, 1],
        'decode_head.1.in_index': [0, 1],
    },
    'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py': {
        'neck.in_channels': [64, 128, 256, 512],
        'decode_head.0.in_channels': [256, 256, 256, 256],
        'decode_head.1.in_channels': [256],
    },
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024.py': {
        'neck.in_channels': [128, 256, 512],
        'decode_head.in_channels': 2048,
        'auxiliary_head.in_channels': 256,
    },
    'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py': {
        'neck': None,
        'decode_head.in_channels': [64, 128, 256, 512],
        'auxiliary_head.in_channels': 256,
    },
    'mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py': {
        'backbone.out_indices': [2],
        'decode_head.in_channels': 256,
        'decode_head.channels': 256,
    },
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py': {
        'backbone.type': 'STDCContextPathNet',
        'backbone.backbone_cfg.out_indices': [1, 2, 3],
        'auxiliary_head.0.in_channels': 128,
        'auxiliary_head.2.in_channels': 128,
    },
    'mmseg::bisenetv1/bisenetv1_r50-d32_4xb4-160k_cityscapes-1024x1024.py': {
        'backbone.context_channels': [128, 256, 512],
        'backbone.spatial_channels': [256, 256, 256, 128],
        'decode_head.in_channels': 1024,
        'auxiliary_head.0.in_channels': 128,
    },
    'mmpretrain::resnet/resnet18_8xb32_in1k.py': {'backbone.out_indices': [3], 'head.in_channels': 512},
    'mmpretrain::resnet/resnet18_8xb16_cifar10.py': {'backbone.out_indices': [3], 'head.in_channels': 512},
    'mmpretrain::mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k.py': {
        'neck.0.type': 'mmpretrain.GlobalAveragePooling',
        'neck.1.type': 'ClsBatchNormNeck',
        'neck.1.input_features': 512,
        'head.in_channels': 512,
    },
    **{
        f'mmpretrain::{name}': {
            'backbone.out_indices': [3],
            'neck.type': neck,
            'head.type': head,
            'head.in_channels': 512,
            'head.num_classes': classes,
        }
        for name, neck, head, classes in [
            ('convnext/convnext-tiny_32xb128_in1k.py', 'mmpretrain.GlobalAveragePooling', 'LinearClsHead', 1000),
            ('swin_transformer/swin-tiny_16xb64_in1k.py', 'GlobalAveragePooling', 'LinearClsHead', 1000),
            ('hornet/hornet-tiny_8xb128_in1k.py', 'mmpretrain.GlobalAveragePooling', 'LinearClsHead', 1000),
            ('van/van-tiny_8xb128_in1k.py', 'GlobalAveragePooling', 'LinearClsHead', 1000),
            (
                'vision_transformer/vit-base-p16_64xb64_in1k.py',
                'mmpretrain.GlobalAveragePooling',
                'VisionTransformerClsHead',
                1000,
            ),
            (
                'deit/deit-tiny-distilled_4xb256_in1k.py',
                'mmpretrain.GlobalAveragePooling',
                'mmpretrain.LinearClsHead',
                1000,
            ),
            (
                'conformer/conformer-tiny-p16_8xb128_in1k.py',
                'mmpretrain.GlobalAveragePooling',
                'mmpretrain.LinearClsHead',
                1000,
            ),
            ('mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py', 'mmpretrain.GlobalAveragePooling', 'LinearClsHead', 1000),
            ('vgg/vgg11_8xb32_in1k.py', 'mmpretrain.GlobalAveragePooling', 'mmpretrain.LinearClsHead', 1000),
            ('vgg/vgg16_8xb16_voc.py', 'mmpretrain.GlobalAveragePooling', 'mmpretrain.MultiLabelLinearClsHead', 20),
        ]
    },
}


@pytest.mark.parametrize('name', CHANGES)
def test_what_is_told_to_neck_and_heads(name):
    config = zoo(name)
    before = config.to_dict()
    state = torch.random.get_rng_state()
    swapped = swap_backbone(config, drop_path_rate=0.3)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    backbone = swapped.model.backbone.get('backbone_cfg', swapped.model.backbone)
    assert (backbone.type, backbone.arch, backbone.drop_path_rate) == ('mmspatialmamba.SpatialMamba', 'tiny', 0.3)
    assert values(swapped.model, CHANGES[name]) == CHANGES[name]


def test_everything_else_stays():
    config = zoo('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    swapped = swap_backbone(config, 'base', pretrained='weights.pth')
    assert swapped.model.backbone == {
        'type': 'mmspatialmamba.SpatialMamba',
        'arch': 'base',
        'out_indices': (0, 1, 2, 3),
        'drop_path_rate': 0.2,
        'pretrained': 'weights.pth',
    }
    swapped.model.backbone = config.model.backbone
    swapped.model.neck.in_channels = config.model.neck.in_channels
    assert swapped.to_dict() == config.to_dict()
    assert Config.fromstring(swapped.pretty_text, '.py').to_dict() == config.to_dict()


def test_weights_of_the_former_model_are_not_loaded():
    config = zoo('mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py')
    assert config.load_from
    assert swap_backbone(config, SMALL).load_from is None
    config = zoo('mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py')
    assert config.model.init_cfg.type == 'Pretrained'
    assert swap_backbone(config, SMALL).model.init_cfg is None


def test_of_an_init_cfg_only_what_loads_weights_is_removed():
    constant = {'type': 'Constant', 'layer': 'Linear', 'val': 1.0}
    config = retinanet()
    config.model.init_cfg = [{'type': 'Pretrained', 'checkpoint': 'former.pth'}, constant]
    assert swap_backbone(config, SMALL).model.init_cfg == [constant]


PURE = """
from mmengine.config import read_base
from mmengine.hooks import CheckpointHook
from mmengine.model import PretrainedInit
from mmdet.models import FPN, BACKBONE, DetDataPreprocessor, FocalLoss, L1Loss, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

default_scope = 'mmdet'
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False
    ),
    backbone=dict(type=BACKBONE, depth=18, out_indices=(0, 1, 2, 3)),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=32, start_level=1, num_outs=3),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=2,
        in_channels=32,
        anchor_generator=dict(type=AnchorGenerator, scales=[4], ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss),
    ),
    init_cfg=dict(type=PretrainedInit, checkpoint='former.pth'),
)
default_hooks = dict(checkpoint=dict(type=CheckpointHook))
"""


def pure(tmp_path, backbone):
    """A config whose types are classes, with this class as its backbone."""
    path = tmp_path / 'pure.py'
    path.write_text(PURE.replace('BACKBONE', backbone))
    return Config.fromfile(path)


def test_pure_python_config(tmp_path):
    config = pure(tmp_path, 'ResNet')
    swapped = swap_backbone(config, SMALL, pretrained='weights.pth')
    assert swapped.model.init_cfg is None
    assert swapped.model.neck.in_channels == [16, 32, 64]
    assert swapped.model.data_preprocessor.std == STD
    swapped.dump(tmp_path / 'swapped.py')
    again = Config.fromfile(tmp_path / 'swapped.py')
    again.model.backbone.pretrained = None
    model = sweep_zoo.build(again)
    assert type(model).__name__ == 'RetinaNet'
    assert sweep_zoo.compute(model, 3) == 'features'
    with pytest.raises(ValueError, match='backbone TridentResNet cannot be swapped or kept'):
        swap_backbone(pure(tmp_path, 'TridentResNet'))


NORMALIZED = [
    ('mmdet::mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py', 'bgr_to_rgb', ['model.data_preprocessor']),
    ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', 'bgr_to_rgb', ['model.data_preprocessor']),
    ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', 'bgr_to_rgb', ['model.data_preprocessor']),
    (
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'bgr_to_rgb',
        ['model.detector.data_preprocessor', 'model.data_preprocessor.data_preprocessor'],
    ),
    ('mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k-384px.py', 'to_rgb', ['data_preprocessor']),
]


@pytest.mark.parametrize(('name', 'order', 'places'), NORMALIZED)
def test_images_are_normalized_as_pretrained_weights_expect(name, order, places):
    config = zoo(name)
    with said() as messages:
        kept = swap_backbone(config, SMALL)
        assert messages == []
        swapped = swap_backbone(config, SMALL, pretrained='weights.pth')
        swap_backbone(swapped, SMALL, pretrained='weights.pth')
    for place in places:
        preprocessor, before, without = (values(cfg, [place])[place] for cfg in (swapped, config, kept))
        assert (preprocessor.mean, preprocessor.std, preprocessor[order]) == (MEAN, STD, True)
        assert without == before
    assert len(messages) == 1
    assert 'normalized as the pretrained weights expect it' in messages[0]


def test_images_that_the_pipeline_normalizes_are_left_alone_and_named():
    config = retinanet(in_channels=4)
    with said() as messages:
        swapped = swap_backbone(config, SMALL, pretrained='weights.pth')
    assert swapped.model.data_preprocessor == config.model.data_preprocessor
    assert 'normalized with 4 channels, which was not changed' in messages.pop()
    config = retinanet()
    config.train_pipeline = [{'type': 'Normalize', 'mean': [0], 'std': [1]}]
    with said() as messages:
        swapped = swap_backbone(config, SMALL, pretrained='weights.pth')
    assert swapped.model.data_preprocessor == config.model.data_preprocessor
    assert 'normalized in the pipeline, which was not changed' in messages.pop()


def test_statistics_of_an_averaged_teacher_follow():
    config = swap_backbone(
        zoo('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'), SMALL
    )
    model = sweep_zoo.build(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        (hook,) = (HOOKS.build(hook) for hook in config.custom_hooks if hook.type == 'MeanTeacherHook')
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    student, teacher = (part.backbone.stem.reduce.norm for part in (model.student, model.teacher))
    student.running_mean.fill_(1.0)
    hook.after_train_iter(runner, 0)
    assert teacher.running_mean.tolist() == pytest.approx([hook.momentum] * len(teacher.running_mean))


@pytest.mark.parametrize(
    ('name', 'average'),
    [
        ('byol/byol_resnet50_16xb256-coslr-200e_in1k.py', 'target_net'),
        ('densecl/densecl_resnet50_8xb32-coslr-200e_in1k.py', 'encoder_k'),
        ('mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py', 'encoder_k'),
        ('mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py', 'momentum_encoder'),
    ],
)
def test_statistics_of_averages_inside_of_a_model_follow(name, average):
    model = sweep_zoo.build(swap_backbone(zoo(f'mmpretrain::{name}'), SMALL))
    average = getattr(model, average)
    model.backbone.stem.reduce.norm.running_mean.fill_(1.0)
    average.update_parameters(torch.nn.Sequential(model.backbone, model.neck))
    assert average.module[0].stem.reduce.norm.running_mean.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ('factor', 'out', 'neck_out', 'head_in'),
    [
        (0.5, [128, 256, 512, 1024], [64, 128, 256, 512], [128, 256, 512, 1024]),  # as YOLOv5 and YOLOv8: as wide as we
        (0.75, [64, 128, 256, 512], [48, 96, 192, 384], [1, 2, 3, 4]),  # as YOLOv6
        (0.5, 256, 128, [1, 2, 3, 4]),  # as RTMDet
    ],
)
def test_channels_before_the_widen_factor_of_mmyolo(factor, out, neck_out, head_in):
    config = retinanet(type='ResNet')
    stated = [int(channels / factor) for channels in (64, 128, 256, 512)]
    out = stated if factor == 0.5 and isinstance(out, list) else out
    config.model.neck = {'type': 'PAFPN', 'in_channels': stated, 'out_channels': out, 'widen_factor': factor}
    config.model.bbox_head = {'head_module': {'in_channels': [1, 2, 3, 4], 'widen_factor': factor}}
    model = swap_backbone(config, 'tiny').model
    assert model.neck == {
        'type': 'PAFPN', 'in_channels': [64, 128, 256, 512], 'out_channels': neck_out, 'widen_factor': 1,
    }  # fmt: skip
    assert model.bbox_head.head_module.in_channels == head_in


def test_a_head_that_takes_all_maps_put_together():
    """As in the pose estimators with HRNet of MMPose, whose neck puts its maps together."""
    config = retinanet(type='ResNet')
    config.model.neck = {'type': 'FeatureMapProcessor', 'concat': True}
    config.model.bbox_head = {'in_channels': 64 + 128 + 256 + 512}
    model = swap_backbone(config, SMALL).model
    assert model.bbox_head.in_channels == 8 + 16 + 32 + 64
    assert model.backbone.out_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ('select', 'channels', 'stages', 'new_select', 'new_channels'),
    [(3, 512, (3,), (0,), 64), (-2, 256, (2,), (0,), 32), ([2, 1], 384, (1, 2), (1, 0), 48)],
)
def test_maps_that_a_neck_selects(select, channels, stages, new_select, new_channels):
    """As in the pose estimators with PVT of MMPose; maps that it leaves out are not returned."""
    config = retinanet(type='ResNet')
    config.model.neck = {'type': 'FeatureMapProcessor', 'select_index': select}
    config.model.bbox_head = {'in_channels': channels}
    model = swap_backbone(config, SMALL).model
    assert model.backbone.out_indices == stages
    assert model.neck.select_index == new_select
    assert model.bbox_head.in_channels == new_channels


@pytest.mark.parametrize('factor', [0.5, 1.0])
def test_a_widen_factor_inside_of_a_neck_stays(factor):
    """As in RTMO of MMPose, whose neck states the channels of its maps and no outputs."""
    config = retinanet(type='ResNet')
    stated = {'type': 'HybridEncoder', 'widen_factor': factor, 'hidden_dim': 256}
    config.model.neck = {**stated, 'in_channels': [64, 128, 256, 512]}
    assert swap_backbone(config, SMALL).model.neck == {**stated, 'in_channels': [8, 16, 32, 64]}


def test_image_channels_stay():
    config = zoo('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    config.model.backbone.in_channels = 4
    assert swap_backbone(config, SMALL).model.backbone.in_channels == 4


def test_detector_of_a_tracker():
    config = zoo('mmdet::masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py')
    detector = swap_backbone(config, SMALL).model.detector
    assert detector.backbone.type == 'mmspatialmamba.SpatialMamba'
    assert detector.neck.in_channels == [8, 16, 32, 64]
    assert detector.init_cfg is None


@pytest.mark.parametrize(
    'name',
    [
        'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
        'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
        'mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
        'mmpose',
    ],
)
def test_layer_decay_reaches_the_rate_of_the_former_stem(name):
    if name == 'mmpose':  # is not installed here: the constructor's name and rules in its ViTPose-S
        config = retinanet()
        config.optim_wrapper = ConfigDict(
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer={'type': 'AdamW', 'lr': 5e-4, 'weight_decay': 0.1},
            paramwise_cfg={'num_layers': 12, 'layer_decay_rate': 0.8, 'custom_keys': {'bias': {'decay_multi': 0.0}}},
        )
    else:
        config = zoo(name)
    rules = config.optim_wrapper.paramwise_cfg
    former = rules.get('decay_rate', rules.get('layer_decay_rate')) ** (rules.get('num_layers', 12) + 1)
    swapped = swap_backbone(config, SMALL)
    backbone = torch.nn.ModuleDict({'backbone': sweep_zoo.build(swapped).backbone})
    wrapper = swapped.optim_wrapper
    wrapper.type = 'OptimWrapper'  # AMP needs a GPU
    wrapper.pop('loss_scale', None)
    groups = build_optim_wrapper(backbone, wrapper).param_groups
    lowest = min(group['lr'] for group in groups)
    assert lowest == pytest.approx(wrapper.optimizer.lr * former)
    assert swap_backbone(swapped, SMALL).optim_wrapper.paramwise_cfg == swapped.optim_wrapper.paramwise_cfg


class WeightAndBiasConstructor:
    """What MMYOLO's YOLOv5OptimizerConstructor does, which is not installed here: three groups, by name."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        assert set(paramwise_cfg) == {'base_total_batch_size'}
        self.cfg = optim_wrapper_cfg

    def __call__(self, model):
        weights, norms, biases = [], [], []
        for module in model.modules():
            if isinstance(getattr(module, 'bias', None), torch.nn.Parameter):
                biases.append(module.bias)
            if isinstance(getattr(module, 'weight', None), torch.nn.Parameter):
                (norms if isinstance(module, torch.nn.BatchNorm2d) else weights).append(module.weight)
        groups = [{'params': weights, 'weight_decay': 5e-4}, {'params': norms}, {'params': biases}]
        return OptimWrapper(torch.optim.SGD(groups, lr=self.cfg.optimizer.lr))


@pytest.mark.parametrize('backbone', ['SpatialMamba', 'VMamba'])
def test_every_parameter_is_trained_under_the_constructor_of_mmyolo(backbone):
    config = retinanet()
    config.optim_wrapper = ConfigDict(
        type='OptimWrapper',
        constructor='YOLOv5OptimizerConstructor',
        optimizer={'type': 'SGD', 'lr': 0.01},
        paramwise_cfg={'base_total_batch_size': 64},
    )
    arch = sweep_zoo.SMALL[backbone]
    swapped = swap_backbone(config, arch, backbone=backbone)
    assert swap_backbone(swapped, arch, backbone=backbone).optim_wrapper == swapped.optim_wrapper
    model = sweep_zoo.build(swapped)
    name = 'YOLOv5OptimizerConstructor'
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(name, module=WeightAndBiasConstructor)
    try:
        groups = build_optim_wrapper(model, swapped.optim_wrapper).optimizer.param_groups
    finally:
        OPTIM_WRAPPER_CONSTRUCTORS.module_dict.pop(name)
    assert [group['weight_decay'] for group in groups] == [5e-4, 0, 0]
    trained = sorted(id(parameter) for group in groups for parameter in group['params'])
    assert trained == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_a_constructor_that_decays_all_is_refused():
    config = {'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.01, 'weight_decay': 0.1}}
    constructor = WholeModelOptimWrapperConstructor(config, {'constructor': 'DefaultOptimWrapperConstructor'})
    message = r'expected DefaultOptimWrapperConstructor to make a group without weight decay, got .*\[0\.1\]'
    with pytest.raises(ValueError, match=message):
        constructor(torch.nn.Linear(2, 2))


REFUSALS = {
    'UNet': 'mmseg::unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
    'ICNet': 'mmseg::icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832.py',
    'BiSeNetV2': 'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'CGNet': 'mmseg::cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680.py',
    'ERFNet': 'mmseg::erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py',
    'FastSCNN': 'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py',
    'PIDNet': 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    'DDRNet': 'mmseg::ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    'VPD': 'mmseg::vpd/vpd_sd_4xb8-25k_nyu-480x480.py',
    'HourglassNet': 'mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py',
    'TridentResNet': 'mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py',
    'RFP': 'mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py',
    'LRASPPHead': 'mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py',
    'DPTHead': 'mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
    'SparseConvNeXt': 'mmpretrain::spark/spark_sparse-convnext-small_16xb256-amp-coslr-800e_in1k.py',
    'SparseResNet': 'mmpretrain::spark/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k.py',
    'LeNet5': 'mmpretrain::lenet/lenet5_mnist.py',
}


@pytest.mark.parametrize('refused', REFUSED)
def test_refusal_names_the_part_and_the_reason(refused):
    with pytest.raises(ValueError, match=f'{refused} cannot be swapped or kept: ') as error:
        swap_backbone(zoo(REFUSALS[refused]))
    assert str(error.value).endswith(REFUSED[refused])


def retinanet(**backbone):
    """A config with a RetinaNet's neck and head, and these keys of the backbone changed."""
    config = zoo('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    config.model.backbone.update(backbone)
    return config


def test_other_refusals():
    with pytest.raises(ValueError, match='MAEViT is pre-trained on the patches that a mask leaves of an image'):
        swap_backbone(zoo('mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py'))
    with pytest.raises(ValueError, match='head ClsHead has no layer, and the backbone states no num_classes'):
        swap_backbone(
            Config(
                {
                    'model': {
                        'type': 'ImageClassifier',
                        'backbone': {'type': 'VGG', 'depth': 11},
                        'head': {'type': 'ClsHead'},
                    }
                }
            )
        )
    with pytest.raises(ValueError, match=r'found MultimodalEncoderDecoder with the keys type, .*, image_encoder'):
        swap_backbone(zoo('mmseg::san/san-vit-b16_coco-stuff164k-640x640.py'))
    with pytest.raises(ValueError, match='found none with the keys none'):
        swap_backbone(Config({'default_scope': 'mmdet'}))
    with pytest.raises(TypeError, match='cfg must be an mmengine Config, got dict'):
        swap_backbone({'model': {}})
    with pytest.raises(ValueError, match='cannot measure the maps of the backbone NoNet: KeyError'):
        swap_backbone(retinanet(type='NoNet'))
    with pytest.raises(ValueError, match=r'ResNet has maps at strides \[4, 8, 16, 16\], SpatialMamba at'):
        swap_backbone(retinanet(strides=(1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r'neck FPN states in_channels \[64, 128, 256, 512\]; expected .* \[64, 128\]'):
        swap_backbone(retinanet(out_indices=(0, 1)))
    with pytest.raises(ValueError, match="backbone must be one of SpatialMamba, VMamba, got 'MM_SpatialMamba'"):
        swap_backbone(retinanet(), backbone='MM_SpatialMamba')
    with pytest.raises(ValueError, match='arch must be one of tiny'):
        swap_backbone(retinanet(), 'huge')
    with pytest.raises(TypeError, match='with_cp'):
        swap_backbone(retinanet(), with_cp=True)
