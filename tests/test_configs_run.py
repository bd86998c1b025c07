"""Every config builds, and with one block a stage takes a training step on tiny input and predicts."""

from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import dump
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

pytestmark = pytest.mark.end_to_end

CONFIGS = Path(__file__).parents[1] / 'configs'
SIDE = 64
# DINO selects 900 queries among all positions of its feature maps, which smaller images do not have.
SIDES = {'dino_sm_t.py': 320}


def detection_sample(side, classes):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    masks = torch.zeros(2, side, side, dtype=torch.uint8).numpy()
    masks[0, 4:40, 4:40] = 1
    masks[1, 10:60, 20:60] = 1
    instances = InstanceData(
        bboxes=torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 60.0]]),
        labels=torch.tensor([0, classes - 1]),
        masks=BitmapMasks(masks, side, side),
    )
    shape = (side, side)
    return DetDataSample(
        gt_instances=instances,
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
        metainfo={'img_shape': shape, 'ori_shape': shape, 'batch_input_shape': shape, 'scale_factor': (1.0, 1.0)},
    )


def segmentation_sample(side, classes):
    from mmseg.structures import SegDataSample

    shape = (side, side)
    labels = torch.zeros(1, *shape, dtype=torch.long)
    labels[:, 10:40, 20:60] = classes - 1
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo={'img_shape': shape, 'ori_shape': shape})


def classification_sample(side, classes):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(classes - 1)


SAMPLES = {'mmdet': detection_sample, 'mmseg': segmentation_sample, 'mmpretrain': classification_sample}


def number_of_classes(model):
    heads = (getattr(model, name, None) for name in ('roi_head', 'bbox_head', 'panoptic_head', 'decode_head', 'head'))
    head = next(head for head in heads if head is not None)
    head = getattr(head, 'bbox_head', head)
    head = head[0] if isinstance(head, torch.nn.ModuleList) else head
    return getattr(head, 'num_classes', None) or head.num_things_classes


def keep_tiny(preprocessor, side):
    """Lets the preprocessor pad to the tiny size, where a config pads to its crop size."""
    if preprocessor.get('size'):
        preprocessor.size = (side, side)
    for augment in preprocessor.get('batch_augments') or []:
        augment.size = (side, side)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_config_trains_and_predicts(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    if 'data_preprocessor' not in config.model:
        config.model.data_preprocessor = config.data_preprocessor
    with torch.device('meta'):
        full = MODELS.build(config.model.backbone)
    config.model.backbone.arch = {**full.arch, 'depths': (1, 1, 1, 1)}
    side = SIDES.get(path.name, SIDE)
    keep_tiny(config.model.data_preprocessor, side)
    model = MODELS.build(config.model)
    model.init_weights()
    channels = config.model.backbone.get('in_channels', 3)
    sample = SAMPLES[config.default_scope](side, number_of_classes(model))
    data = {
        'inputs': [torch.randint(0, 256, (channels, side, side), dtype=torch.uint8) for _ in range(2)],
        'data_samples': [sample, sample.clone()],
    }
    batch = model.train().data_preprocessor(data, training=True)
    losses = model(**batch, mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite()
    backbone = dict(model.backbone.named_parameters())
    assert [name for name, p in backbone.items() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        predictions = model.eval().test_step(data)
    assert len(predictions) == 2


def test_files_of_four_channels_reach_the_model(tmp_path):
    config = Config.fromfile(CONFIGS / 'finetune_mask_rcnn_sm_t_4ch.py')
    (tmp_path / 'train2017').mkdir()
    rng = np.random.default_rng(0)
    mmcv.imwrite(rng.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8), str(tmp_path / 'train2017' / '0.png'))
    square = [4, 4, 40, 4, 40, 40, 4, 40]
    instance = {
        'id': 1, 'image_id': 0, 'category_id': 1, 'bbox': [4, 4, 36, 36], 'area': 1296, 'iscrowd': 0,
        'segmentation': [square],
    }  # fmt: skip
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(config.classes)]
    images = [{'id': 0, 'file_name': '0.png', 'height': SIDE, 'width': SIDE}]
    dump({'images': images, 'annotations': [instance], 'categories': categories}, tmp_path / 'instances.json')

    init_default_scope('mmdet')
    dataset = config.train_dataloader.dataset
    dataset.update(data_root=str(tmp_path), ann_file='instances.json')
    dataset.pipeline[2].scale = (SIDE, SIDE)
    config.model.backbone.arch = {'embed_dims': 64, 'depths': (1, 1, 1, 1)}
    data = pseudo_collate([DATASETS.build(dataset)[0]] * 2)
    assert data['inputs'][0].shape == (4, SIDE, SIDE)
    assert abs(data['inputs'][0].mean()) < 1  # normalized
    model = MODELS.build(config.model)
    model.train()
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, training=True), mode='loss'))
    assert loss.isfinite()
