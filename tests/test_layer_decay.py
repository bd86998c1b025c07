"""Layer depths, and the optimizer constructor that decays learning rates by them, in all three toolboxes."""

from pathlib import Path

import pytest
import torch
import torchvision_setup  # noqa: F401
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmspatialmamba import LayerDecayOptimWrapperConstructor, SpatialMamba

CONFIGS = Path(__file__).parents[1] / 'configs'
ARCH = {'embed_dims': 8, 'depths': (1, 2, 1, 1)}
LAYERS = 7  # stem, five blocks, heads

MASK_RCNN = {
    'neck': {'in_channels': [8, 16, 32, 64], 'out_channels': 8},
    'rpn_head': {'in_channels': 8, 'feat_channels': 8},
    'roi_head': {
        'bbox_roi_extractor': {'out_channels': 8},
        'bbox_head': {'in_channels': 8, 'fc_out_channels': 8},
        'mask_roi_extractor': {'out_channels': 8},
        'mask_head': {'in_channels': 8, 'conv_out_channels': 8},
    },
}
UPERNET = {
    'decode_head': {'in_channels': [8, 16, 32, 64], 'channels': 8},
    'auxiliary_head': {'in_channels': 32, 'channels': 8},
}
CLASSIFIER = {'head': {'in_channels': 64}}
SMALL_MODELS = {'mask_rcnn_sm_t.py': MASK_RCNN, 'upernet_sm_t.py': UPERNET, 'cls_sm_t.py': CLASSIFIER}

EXPECTED_DEPTHS = {
    'stem.reduce.conv.weight': 0,
    'stages.0.blocks.0.ssm.A_log': 1,
    'stages.0.downsample.expand.weight': 1,
    'stages.1.blocks.0.mlp.fc1.bias': 2,
    'stages.1.blocks.1.norm1.weight': 3,
    'stages.1.downsample.project.norm.bias': 3,
    'stages.2.blocks.0.cpe1.weight': 4,
    'stages.3.blocks.0.ssm.state_fusion.alpha': 5,
    'out_norms.0.weight': 6,
    'out_norms.3.bias': 6,
}


class Model(nn.Module):
    """A backbone beside a head."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = SpatialMamba(ARCH, **backbone)
        self.head = nn.Linear(8, 8)


def small_config(name):
    config = Config.fromfile(CONFIGS / name)
    config.model.backbone.arch = ARCH
    config.merge_from_dict({'model': SMALL_MODELS[name]})
    return config


def build(model, constructor='LayerDecayOptimWrapperConstructor', optimizer=None, **paramwise):
    return build_optim_wrapper(
        model,
        {
            'type': 'OptimWrapper',
            'constructor': constructor,
            'optimizer': optimizer or {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.05},
            'paramwise_cfg': paramwise,
        },
    )


def groups_by_name(model, wrapper):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[group['params'][0]]: group for group in wrapper.optimizer.param_groups}
    assert len(groups) == len(wrapper.optimizer.param_groups)
    return groups


def assert_decayed(model, wrapper, rate, lr=1.0, prefix='backbone.'):
    groups = groups_by_name(model, wrapper)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, depth in EXPECTED_DEPTHS.items():
        if prefix + name in groups:
            assert groups[prefix + name]['lr'] == pytest.approx(lr * rate ** (LAYERS - 1 - depth)), name
    others = [group['lr'] for name, group in groups.items() if not name.startswith(prefix)]
    assert others or not prefix
    assert set(others) <= {lr}


@pytest.mark.parametrize(('name', 'depth'), EXPECTED_DEPTHS.items())
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_depth(name, depth, prefix):
    backbone = SpatialMamba(ARCH)
    assert name in dict(backbone.named_parameters())
    assert backbone.get_layer_depth(prefix + name, prefix) == (depth, LAYERS)


def test_depth_of_a_head():
    assert SpatialMamba(ARCH).get_layer_depth('head.fc.weight', 'backbone.') == (LAYERS - 1, LAYERS)


def test_every_layer_of_a_published_backbone_has_parameters():
    with torch.device('meta'):
        backbone = SpatialMamba('small')
    depths = {backbone.get_layer_depth(name) for name, _ in backbone.named_parameters()}
    assert depths == {(depth, 34) for depth in range(34)}


def test_depth_counts_the_stages_that_are_built():
    assert SpatialMamba(ARCH, out_indices=(1,)).get_layer_depth('stages.1.blocks.1.norm1.weight') == (3, 5)


@pytest.mark.parametrize('config_name', SMALL_MODELS)
def test_works_with_the_recipes_of_each_toolbox(config_name):
    config = small_config(config_name)
    base_lr = config.optim_wrapper.optimizer.lr
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        plain = groups_by_name(model, build_optim_wrapper(model, {**config.optim_wrapper, 'type': 'OptimWrapper'}))
        config.optim_wrapper.constructor = 'LayerDecayOptimWrapperConstructor'
        config.optim_wrapper.paramwise_cfg.decay_rate = 0.7
        wrapper = build_optim_wrapper(model, {**config.optim_wrapper, 'type': 'OptimWrapper'})
    assert_decayed(model, wrapper, 0.7, base_lr)
    decayed = groups_by_name(model, wrapper)
    assert {name: group['weight_decay'] for name, group in decayed.items()} == {
        name: group['weight_decay'] for name, group in plain.items()
    }
    assert {group['weight_decay'] for group in decayed.values()} == {0.0, config.optim_wrapper.optimizer.weight_decay}


def test_mmpretrains_own_constructor_works_with_the_backbone():
    config = small_config('cls_sm_t.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
        wrapper = build(model, 'LearningRateDecayOptimWrapperConstructor', layer_decay_rate=0.5)
    assert_decayed(model, wrapper, 0.5)


def test_scoped_name_and_a_backbone_alone():
    backbone = SpatialMamba(ARCH)
    wrapper = build(backbone, 'mmspatialmamba.LayerDecayOptimWrapperConstructor', decay_rate=0.5)
    assert_decayed(backbone, wrapper, 0.5, prefix='')


def test_a_wrapped_model(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        assert_decayed(model.module, build(model, decay_rate=0.5), 0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_a_backbone_deep_in_a_model():
    model = nn.ModuleDict({'student': Model(), 'head': nn.Linear(2, 2)})
    assert_decayed(model, build(model, decay_rate=0.5), 0.5, prefix='student.backbone.')


def test_custom_rates_are_scaled_too():
    model = Model()
    groups = groups_by_name(model, build(model, decay_rate=0.5, custom_keys={'A_log': {'lr_mult': 0.1}}))
    assert groups['backbone.stages.3.blocks.0.ssm.A_log']['lr'] == pytest.approx(0.05)
    assert groups['backbone.stages.3.blocks.0.ssm.D']['lr'] == pytest.approx(0.5)


def test_frozen_parameters_stay_out():
    model = Model(frozen_stages=1)
    groups = groups_by_name(model, build(model, decay_rate=0.5))
    assert not any(name.startswith(('backbone.stem', 'backbone.stages.0')) for name in groups)
    assert groups['backbone.stages.1.blocks.0.norm1.bias']['lr'] == pytest.approx(0.5**4)


def test_building_twice_scales_once():
    model = Model()
    constructor = LayerDecayOptimWrapperConstructor(
        {'optimizer': {'type': 'SGD', 'lr': 1.0}}, paramwise_cfg={'decay_rate': 0.5}
    )
    constructor(model)
    assert_decayed(model, constructor(model), 0.5)


@pytest.mark.parametrize('rate', [None, 0, -0.5, 1.5, 'high'])
def test_a_bad_rate_raises(rate):
    paramwise = {} if rate is None else {'decay_rate': rate}
    with pytest.raises(ValueError, match=r"paramwise_cfg\['decay_rate'\] must be a number above 0 and at most 1, got"):
        build(Model(), norm_decay_mult=0.0, **paramwise)


def test_an_optimizer_without_lr_raises():
    with pytest.raises(ValueError, match='expected an optimizer with lr, got only type'):
        build(Model(), optimizer={'type': 'AdamW'}, decay_rate=0.5)


def test_a_model_without_the_backbone_raises():
    with pytest.raises(ValueError, match='expected a model with a backbone of mmspatialmamba, found none in Linear'):
        build(nn.Linear(2, 2), decay_rate=0.5)
