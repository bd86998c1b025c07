"""A training step and predictions of configs of the toolboxes with a very small backbone of this package in them."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData, PixelData

from mmspatialmamba import swap_backbone

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
import sweep_zoo

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}
SMALL_OF = {'SpatialMamba': SMALL, 'VMamba': {**SMALL, 'ssm_ratio': 1}}

TRAINED = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'mmdet::fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py',
    'mmdet::cascade_rcnn/cascade-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py',
    'mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
    'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py',
    'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py',
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    'mmseg::ocrnet/ocrnet_r101-d8_8xb2-40k_cityscapes-512x1024.py',
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py',
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
    'mmpretrain::deit/deit-tiny-distilled_4xb256_in1k.py',
    'mmpretrain::hornet/hornet-tiny_8xb128_in1k.py',
    'mmpretrain::vgg/vgg16_8xb16_voc.py',
    'mmpretrain::vig/vig-tiny_8xb128_in1k.py',
    'mmpretrain::csra/resnet101-csra_1xb16_voc07-448px.py',
]


def detection_samples(side, semantic_stride=1):
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        2, (3, side, side), num_items=[2, 3], num_classes=2, with_mask=True, with_semantic=True,
        sem_seg_output_strides=semantic_stride,
    )  # fmt: skip


def with_proposals(data):
    """For detectors without a network of their own for proposals."""
    for sample in data['data_samples']:
        sample.proposals = InstanceData(bboxes=sample.gt_instances.bboxes + torch.tensor([-2.0, -2.0, 2.0, 2.0]))
    return data


def track_samples(side):
    from mmdet.testing import demo_track_inputs

    data = demo_track_inputs(1, 2, [0], (3, side, side), num_items=[3], num_classes=1, with_mask=True)
    for sample in data['data_samples'][0].video_data_samples:
        sample.set_metainfo({'ori_video_length': 2, 'video_length': 2})
        sample.gt_instances.instances_ids = torch.arange(3)
    return data


def identity_samples():
    from mmdet.structures import ReIDDataSample

    images = list(torch.randint(0, 256, (4, 3, 256, 128), dtype=torch.uint8))  # the neck pools windows of 8 x 4
    return {'inputs': images, 'data_samples': [ReIDDataSample().set_gt_label(i // 2) for i in range(4)]}


def semi_supervised_samples(side):
    branches = {name: detection_samples(side) for name in ('sup', 'unsup_teacher', 'unsup_student')}
    for data in branches.values():
        for sample in data['data_samples']:
            sample.set_metainfo({'homography_matrix': torch.eye(3).numpy()})
    return {key: {name: data[key] for name, data in branches.items()} for key in ('inputs', 'data_samples')}


def segmentation_samples(side):
    from mmseg.structures import SegDataSample

    labels = torch.arange(side * side).reshape(1, side, side) * 4 // side**2
    shape = {'img_shape': (side, side), 'ori_shape': (side, side)}
    sample = SegDataSample(
        metainfo=shape, gt_sem_seg=PixelData(data=labels), gt_edge_map=PixelData(data=labels.clamp(max=1))
    )
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    return {'inputs': [image, image.flip(-1)], 'data_samples': [sample, sample.clone()]}


def classification_samples(side):
    from mmpretrain.structures import DataSample

    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    return {'inputs': [image, image.flip(-1)], 'data_samples': [DataSample().set_gt_label(i) for i in (1, 3)]}


def multi_label_samples(side):
    data = classification_samples(side)
    for sample in data['data_samples']:
        sample.set_gt_score(torch.eye(20)[sample.gt_label[0]])
    return data


def views(side, count):
    """Several views of each of four images, as self-supervised methods take them."""
    return {'inputs': list(torch.randint(0, 256, (count, 4, 3, side, side), dtype=torch.uint8)), 'data_samples': None}


LARGER = {'DINO': 256, 'DDOD': 384, 'DDQDETR': 256, 'FPG': 256, 'SSDNeck': 320}
"""Sides of images for methods that select hundreds of positions, or divide maps often, or have a deformable kernel."""


def larger(model, side):
    """Returns the side of images that a model needs, by its type or its neck's."""
    return max(
        LARGER.get(part.get('type'), side) for part in (model, model.get('neck') or {}) if isinstance(part, dict)
    )


def small(config):
    """Changes what sizes of a config are too large for a test, and returns samples for training and for prediction."""
    model, scope = config.model, config.default_scope
    if scope == 'mmseg':
        side = larger(model, 64)
        model.data_preprocessor.size = (side, side)
        return segmentation_samples(side), segmentation_samples(side)
    if scope == 'mmpretrain':
        model.data_preprocessor = config.get('data_preprocessor') or model.get('data_preprocessor')
        if model.type == 'ImageClassifier':
            data = multi_label_samples(64) if 'CSRA' in model.head.type else classification_samples(64)
            return data, data
        data = views(64, 8 if model.type == 'SwAV' else 2)
        return data, {**data, 'inputs': data['inputs'][0]}
    preprocessor = model.data_preprocessor
    if preprocessor.type == 'TrackDataPreprocessor':
        return track_samples(128), track_samples(128)
    if preprocessor.type == 'ReIDDataPreprocessor':
        return identity_samples(), identity_samples()
    if preprocessor.type == 'MultiBranchDataPreprocessor':
        return semi_supervised_samples(128), detection_samples(128)
    preprocessor.pop('batch_augments', None)  # they pad to the full training size
    if (model.get('test_cfg') or {}).get('rpn'):
        model.test_cfg.rpn.max_per_img = 8  # each costs the shared head of a detector without a neck
    if model.type == 'CrowdDet':  # torchvision's operator in Python, where it is not compiled, takes gigabytes
        model.roi_head.bbox_roi_extractor.roi_layer.pop('use_torchvision', None)
    data = detection_samples(larger(model, 128), 8 if model.type == 'SCNet' else 1)
    if (model.get('bbox_head') or {}).get('num_classes') == 1:
        for sample in data['data_samples']:
            sample.gt_instances.labels.zero_()
    return (with_proposals(data) if model.type == 'FastRCNN' else data,) * 2


def in_one_process(config):
    """Returns the config with BatchNorm that belongs to one process; MMCV's cannot even be built outside of a group."""
    if isinstance(config, dict):
        config = {key: in_one_process(value) for key, value in config.items()}
        return config | {'type': 'BN'} if config.get('type') in ('SyncBN', 'MMSyncBN') else config
    return type(config)(map(in_one_process, config)) if isinstance(config, (list, tuple)) else config


def train_and_predict(config, backbone, trains=True, predicts=True):
    """Swaps the backbone, computes loss and gradients, and predicts. The gradients of the backbone are finite, and all
    are there unless the config says that some are not."""
    torch.manual_seed(0)
    stated = config.get('find_unused_parameters', False)
    config = swap_backbone(config, SMALL_OF[backbone], backbone=backbone)
    training, testing = small(config)
    config.model = in_one_process(config.model)
    model = sweep_zoo.build(config)
    MessageHub.get_current_instance().update_info('epoch', 0)  # as the training loop does, for heads that ask
    # Memory without values until then (deformable transformers), and boxes of any sign.
    refines = (config.model.get('rpn_head') or {}).get('type') == 'EmbeddingRPNHead'
    if hasattr(model, 'level_embed') or refines:
        model.init_weights()
    model.train()
    if not trains:
        with pytest.raises(NotImplementedError, match="MMPretrain doesn't support"):
            model(**model.data_preprocessor(training, training=True), mode='loss')
    else:
        losses = model(**model.data_preprocessor(training, training=True), mode='loss')
        loss, _ = model.parse_losses(losses)
        assert loss.isfinite()
        loss.backward()
        part = next((getattr(model, name) for name in ('detector', 'student') if hasattr(model, name)), model)
        parameters = part.backbone.named_parameters()
        gradients = {key: p.grad for key, p in parameters if p.requires_grad}
        unused = [key for key, gradient in gradients.items() if gradient is None]
        assert stated or bool(unused) == config.get('find_unused_parameters', False), unused
        assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
        assert any(gradient.any() for gradient in gradients.values() if gradient is not None)
    model.eval()
    config.model.data_preprocessor.pop('size', None)
    if refines:  # random offsets move boxes out of the image, where MMDetection cannot paste masks on a CPU
        for head in model.roi_head.bbox_head:
            torch.nn.init.zeros_(head.fc_reg.weight)
    with torch.no_grad():
        if not predicts:
            with pytest.raises(AttributeError, match="'SSDHead' object has no attribute 'loss_cls'"):
                model.test_step(testing)
        elif isinstance(testing['data_samples'], list):
            check_predictions(model.test_step(testing), testing)
        else:  # a self-supervised method, which predicts nothing
            maps = model(**model.data_preprocessor(testing), mode='tensor')
            assert all(x.isfinite().all() for x in maps)


def check_predictions(predictions, data):
    """As many as there are samples, each with what its task predicts."""
    assert len(predictions) == len(data['data_samples'])
    found = ('pred_instances', 'pred_sem_seg', 'pred_score', 'pred_feature', 'pred_track_instances')
    found += ('pred_panoptic_seg',)
    for sample in predictions:
        for part in getattr(sample, 'video_data_samples', [sample]):
            assert any(key in part for key in found), part


STEPS = [pytest.param(name, 'SpatialMamba', marks=pytest.mark.end_to_end) for name in TRAINED]
STEPS += [pytest.param(name, 'VMamba', marks=pytest.mark.long) for name in TRAINED]


@pytest.mark.parametrize(('name', 'backbone'), STEPS)
def test_training_step_and_prediction(name, backbone):
    toolbox, _, path = name.partition('::')
    train_and_predict(read(toolbox, path), backbone)


WITHOUT = {
    'mmdet': {
        'boxinst', 'carafe', 'centripetalnet', 'common', 'cornernet', 'deepsort', 'glip', 'grounding_dino', 'lad', 'ld',
        'misc', 'mm_grounding_dino', 'ocsort', 'timm_example', 'tridentnet',
    },
    'mmseg': {
        'bisenetv2', 'cgnet', 'ddrnet', 'dpt', 'erfnet', 'fastscnn', 'icnet', 'mobilenet_v3', 'pidnet', 'san', 'unet',
        'vpd',
    },
    'mmpretrain': {
        'arcface', 'blip', 'blip2', 'chinese_clip', 'dinov2', 'flamingo', 'glip', 'itpn', 'lenet', 'llava', 'minigpt4',
        'ofa', 'otter', 'sam',
    },
}  # fmt: skip
"""Families that hold no config that works, for which docs/zoo_coverage.md has the reasons, or none with a model."""

INSTEAD = {
    'mmdet': {
        'bytetrack': 'yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
        'detectors': 'cascade-rcnn_r50-sac_1x_coco.py',
        'strongsort': 'yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
    },
    'mmseg': {},
    'mmpretrain': {
        'beit': 'benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py',
        'beitv2': 'benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py',
        'cae': 'benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py',
        'clip': 'vit-base-p16_pt-64xb64_in1k.py',
        'eva02': 'eva02-tiny-p14_in1k.py',
        'mae': 'benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
        'maskfeat': 'benchmarks/vit-base-p16_8xb256-coslr-100e_in1k.py',
        'mff': 'benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
        'milan': 'benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
        'mixmim': 'benchmarks/mixmim-base_8xb128-coslr-100e_in1k.py',
        'replknet': 'replknet-XL_32xb64_in1k-320px.py',
        'resnest': 'resnest50_32xb64_in1k.py',
        'simmim': 'benchmarks/swin-base-w6_8xb256-coslr-100e_in1k-192px.py',
        'spark': 'benchmarks/resnet50_8xb256-coslr-300e_in1k.py',
        'swin_transformer_v2': 'swinv2-tiny-w8_16xb64_in1k-256px.py',
    },
}
"""What is tried of families whose usual choice does not work, or trains without a swapped backbone."""

UNTRAINED = ('efficientformer', 'levit')
"""Families whose heads MMPretrain has for prediction only, of models that were trained by distillation elsewhere."""


UNPREDICTED = ('ssd',)
"""Families with which MMDetection 3.3.0 cannot predict, with its own backbones neither."""


def read(toolbox, path):
    """Reads a config of a toolbox."""
    return Config.fromfile(sweep_zoo.configs_of(toolbox) / path)


def families(toolbox):
    """Returns the family of each config that lies in one."""
    found = {}
    for path in sweep_zoo.configs_of(toolbox).glob('*/*.py'):
        if path.parent.name not in {'_base_', *WITHOUT[toolbox]}:
            found.setdefault(path.parent.name, []).append(path.name)
    return found


def choose(names):
    """The config of a family that is tried: with the smallest ResNet if there is one."""
    sizes = ('r18', 'resnet18', 'r50', 'resnet50')
    return min(names, key=lambda name: (min([k for k, size in enumerate(sizes) if size in name], default=9), name))


FAMILIES = [(toolbox, family, names) for toolbox in WITHOUT for family, names in sorted(families(toolbox).items())]


@pytest.mark.long
@pytest.mark.parametrize('backbone', SMALL_OF)
@pytest.mark.parametrize(('toolbox', 'family'), [(toolbox, family) for toolbox, family, _ in FAMILIES])
def test_a_config_of_every_family_trains_and_predicts(toolbox, family, backbone):
    if family == 'paa':
        pytest.importorskip('sklearn', reason="PAA's loss needs scikit-learn")
    names = families(toolbox)[family]
    path = f'{family}/{INSTEAD[toolbox].get(family) or choose(names)}'
    config = read(toolbox, path)
    config.default_scope = toolbox
    train_and_predict(config, backbone, family not in UNTRAINED, family not in UNPREDICTED)
