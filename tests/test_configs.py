"""Every config resolves; the published recipes equal those of the paper's repository; optimizer groups."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

import mmspatialmamba
from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint_names import to_official

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_config_resolves_and_its_backbone_builds(path):
    config = Config.fromfile(path)
    backbone = dict(config.model.backbone)
    assert backbone.pop('type') == 'SpatialMamba'
    model = SpatialMamba(**backbone)
    assert list(model.channels) == config.model.neck.in_channels


def test_mask_rcnn_1x_is_the_published_recipe():
    config = Config.fromfile(CONFIGS / 'mask_rcnn_sm_t.py')
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, tuple(optimizer.betas), optimizer.weight_decay) == (
        'AdamW',
        1e-4,
        (0.9, 0.999),
        0.05,
    )
    warm_up, steps = config.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.by_epoch, warm_up.end) == ('LinearLR', 0.001, False, 1000)
    assert (steps.type, steps.milestones, steps.gamma, steps.end) == ('MultiStepLR', [8, 11], 0.1, 12)
    assert config.train_cfg.max_epochs == 12
    transforms = {transform.type: transform for transform in config.train_pipeline}
    assert tuple(transforms['Resize'].scale) == (1333, 800)
    assert transforms['Resize'].keep_ratio
    assert transforms['RandomFlip'].prob == 0.5
    assert config.model.backbone.drop_path_rate == 0.2
    assert SpatialMamba(config.model.backbone.arch).channels == (64, 128, 256, 512)
    assert config.train_dataloader.dataset.data_root == 'data/coco/'


class Detector(nn.Module):
    """A backbone and a head with the kinds of parameters that heads have."""

    def __init__(self):
        super().__init__()
        self.backbone = SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 1, 1)})
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))


def decayed_names(config_name):
    config = Config.fromfile(CONFIGS / config_name)
    init_default_scope('mmdet')
    model = Detector()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert set(names.values()) == {0.0, config.optim_wrapper.optimizer.weight_decay}
    return {name for name, value in names.items() if value}


def test_no_decay_on_norms_and_vectors():
    model = Detector()
    expected = {
        name for name, parameter in model.named_parameters() if parameter.ndim > 1 and not name.endswith('A_log')
    }
    assert decayed_names('mask_rcnn_sm_t.py') == expected
    assert {name.rsplit('.', 1)[-1] for name in expected} == {
        'weight',
        'dt_weight',
        'dwconv_d1',
        'dwconv_d3',
        'dwconv_d5',
    }


def test_published_decay_exempts_what_is_named_norm_in_the_original():
    names = (name for name, _ in Detector().named_parameters())
    expected = {name for name in names if 'norm' not in to_official(name.removeprefix('backbone.'))}
    assert decayed_names('mask_rcnn_sm_t_published_decay.py') == expected
    assert 'backbone.stages.0.blocks.0.norm1.weight' in expected
    assert 'backbone.out_norms.1.weight' not in expected


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert mmspatialmamba.__version__ == version('mmspatialmamba')
