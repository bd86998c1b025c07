"""Every config resolves; the published recipes equal those of the paper's repository; optimizer groups."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from torch import nn

import mmspatialmamba
from mmspatialmamba import SpatialMamba, VMamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_config_resolves_and_its_backbone_builds(path):
    backbone = dict(Config.fromfile(path).model.backbone)
    family = VMamba if '_vmamba_' in path.stem else SpatialMamba
    assert backbone.pop('type') == f'mmspatialmamba.{family.__name__}'
    with torch.device('meta'):
        family(**backbone)


SMALL = dict.fromkeys(('mask_rcnn_sm_t', 'mask2former_semantic_sm_t', 'cls_sm_t'), 'embed_dims=64, depths=(1,) * 4')
SMALL['cls_vmamba_t'] = 'embed_dims=96, depths=(1,) * 4, ssm_ratio=1'


@pytest.mark.end_to_end
@pytest.mark.parametrize('name', SMALL)
def test_imports_and_hooks_of_a_child_switch_nothing_off(name, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(
        f'_base_ = [{str(CONFIGS / name)!r} + ".py"]\n'
        'custom_imports = dict(imports=["json"], allow_failed_imports=False)\n'
        'custom_hooks = [dict(type="EmptyCacheHook")]\n'
        f'model = dict(backbone=dict(arch=dict(_delete_=True, {SMALL[name]}), pretrained=None))\n'
    )
    code = f"""
        import sys
        sys.path.append({str(Path(__file__).parent)!r})
        import torchvision_setup
        from mmengine.config import Config
        from mmengine.registry import HOOKS, MODELS, init_default_scope
        config = Config.fromfile({str(child)!r})
        assert 'mmspatialmamba' not in sys.modules
        init_default_scope(config.default_scope)
        model = MODELS.build(config.model)
        with HOOKS.switch_scope_and_registry(None) as registry:
            hooks = [registry.get(hook.type) for hook in (*config.default_hooks.values(), *config.custom_hooks)]
        print(type(model.backbone).__name__, *(hook.__name__ for hook in hooks))
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    backbone, *hooks = result.stdout.splitlines()[-1].split()
    assert backbone == ('VMamba' if 'vmamba' in name else 'SpatialMamba')
    assert ('EMAHook' in hooks) == name.startswith('cls_')
    assert ('MESAHook' in hooks) == (name == 'cls_sm_t')


def optimizer_of(config):
    optimizer = config.optim_wrapper.optimizer
    return optimizer.type, optimizer.lr, tuple(optimizer.betas), optimizer.weight_decay


VARIANTS = {
    'sm': {'t': (64, (2, 4, 8, 4), 0.2), 's': (64, (2, 4, 21, 5), 0.3), 'b': (96, (2, 4, 21, 5), 0.5)},
    'vmamba': {'t': (96, (2, 2, 8, 2), 0.2), 's': (96, (2, 2, 15, 2), 0.3), 'b': (128, (2, 2, 15, 2), 0.6)},
}
each_name = pytest.mark.parametrize('name', VARIANTS)


@pytest.mark.parametrize('method', ['mask_rcnn', 'upernet', 'cls'])
@each_name
def test_published_variants(method, name):
    family = {'sm': SpatialMamba, 'vmamba': VMamba}[name]
    for arch, sizes in VARIANTS[name].items():
        config = Config.fromfile(CONFIGS / f'{method}_{name}_{arch}.py').model
        backbone = dict(config.backbone)
        assert backbone.pop('type') == f'mmspatialmamba.{family.__name__}'
        with torch.device('meta'):
            model = family(**backbone)
        assert (model.channels[0], model.depths, backbone['drop_path_rate']) == sizes
        channels = list(model.channels)
        if method == 'mask_rcnn':
            assert config.neck.in_channels == channels
        elif method == 'upernet':
            assert config.decode_head.in_channels == channels
            assert (config.auxiliary_head.in_channels, config.auxiliary_head.in_index) == (channels[2], 2)
        else:
            assert config.head.in_channels == channels[3]


def test_ratios_of_the_published_vmambas():
    ratios = {arch: Config.fromfile(CONFIGS / f'cls_vmamba_{arch}.py').model.backbone.arch for arch in 'tsb'}
    assert [VMamba.ARCHITECTURES[arch]['ssm_ratio'] for arch in ratios.values()] == [1, 2, 2]


@each_name
def test_mask_rcnn_3x_is_the_published_recipe(name):
    for arch in 'ts':
        config = Config.fromfile(CONFIGS / f'mask_rcnn_{name}_{arch}_3x.py')
        assert optimizer_of(config) == ('AdamW', 1e-4, (0.9, 0.999), 0.05)
        assert config.param_scheduler[1].milestones == [27, 33]
        assert config.train_cfg.max_epochs == config.param_scheduler[1].end == 36
        choice = next(step for step in config.train_dataloader.dataset.pipeline if step.type == 'RandomChoice')
        resize, crop_and_resize = choice.transforms
        assert [tuple(scale) for scale in resize[0].scales] == [(side, 1333) for side in range(480, 801, 32)]
        assert [step.type for step in crop_and_resize] == ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize']


@each_name
def test_upernet_is_the_published_recipe(name):
    config = Config.fromfile(CONFIGS / f'upernet_{name}_t.py')
    assert config.model.test_cfg.mode == 'whole'
    assert optimizer_of(config) == ('AdamW', 6e-5, (0.9, 0.999), 0.01)
    assert config.train_dataloader.batch_size * 4 == config.auto_scale_lr.base_batch_size == 16
    warm_up, poly = config.param_scheduler
    assert (warm_up.type, warm_up.end, poly.type, poly.power, poly.eta_min) == ('LinearLR', 1500, 'PolyLR', 1.0, 0.0)
    assert config.train_cfg.max_iters == poly.end == 160000
    crop = next(step for step in config.train_dataloader.dataset.pipeline if step.type == 'RandomCrop')
    assert tuple(crop.crop_size) == tuple(config.model.data_preprocessor.size) == (512, 512)


@pytest.mark.parametrize(
    ('name', 'ratios'),
    [
        ('upernet_sm_t.py', [0.75, 1.0, 1.25]),
        ('upernet_sm_t_six_scales.py', [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]),
        ('upernet_vmamba_b.py', [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]),
    ],
)
def test_upernet_augments_tests(name, ratios):
    scales, flips, *_ = Config.fromfile(CONFIGS / name).tta_pipeline[1].transforms
    assert [scale.scale_factor for scale in scales] == ratios
    assert [flip.prob for flip in flips] == [0.0, 1.0]


@each_name
def test_classification_is_the_published_recipe(name):
    for arch, mesa_weight in zip('tsb', (1.0, 1.5, 2.0), strict=True):
        config = Config.fromfile(CONFIGS / f'cls_{name}_{arch}.py')
        assert optimizer_of(config) == ('AdamW', 1e-3, (0.9, 0.999), 0.05)
        assert config.model.get('mesa_weight') == (mesa_weight if name == 'sm' else None)
    test = {step.type: step for step in config.test_dataloader.dataset.pipeline}
    assert (test['ResizeEdge'].scale, test['ResizeEdge'].interpolation, test['CenterCrop'].crop_size) == (
        256, 'bicubic', 224,
    )  # fmt: skip
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 1024
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.optim_wrapper.type == 'AmpOptimWrapper'
    warm_up, cosine = config.param_scheduler
    assert (warm_up.start_factor * 1e-3, warm_up.end) == (1e-6, 20)
    assert (cosine.type, cosine.eta_min, cosine.end) == ('CosineAnnealingLR', 1e-5, 300)
    assert config.train_cfg.max_epochs == 300
    mixup, cutmix = config.model.train_cfg.augments
    assert (mixup.type, mixup.alpha, cutmix.type, cutmix.alpha) == ('Mixup', 0.8, 'CutMix', 1.0)
    assert config.model.head.loss.label_smooth_val == 0.1
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert (steps['RandAugment'].magnitude_level, steps['RandAugment'].magnitude_std) == (9, 0.5)
    assert steps['RandAugment'].policies == 'timm_increasing'
    # The authors' colour jitter has no effect: timm's create_transform leaves it out beside RandAugment.
    assert 'ColorJitter' not in steps
    assert steps['RandomErasing'].erase_prob == 0.25
    ema, mesa = config.default_hooks.ema, config.default_hooks.get('mesa')
    assert (ema.type, ema.momentum) == ('EMAHook', 1e-4)
    assert (mesa.begin_epoch == config.train_cfg.max_epochs // 4) if name == 'sm' else mesa is None


def test_classification_averages_the_statistics_of_batch_norm():
    hook = dict(Config.fromfile(CONFIGS / 'cls_sm_t.py').default_hooks.ema)
    del hook['priority']
    init_default_scope('mmpretrain')
    hook = HOOKS.build(hook)
    model = nn.BatchNorm2d(2)
    hook.before_run(SimpleNamespace(model=model))
    for mean in (0.0, 1.0):  # the first update copies
        model.running_mean.fill_(mean)
        hook.after_train_iter(SimpleNamespace(model=model, iter=0, epoch=0), 0)
    assert hook.ema_model.module.running_mean.tolist() == pytest.approx([1e-4, 1e-4])


def test_classification_on_a_cpu_as_the_faq_says():
    option = 'optim_wrapper.type=OptimWrapper'
    assert option in (CONFIGS.parent / 'docs' / 'faq.md').read_text()
    config = Config.fromfile(CONFIGS / 'cls_sm_t.py')
    config.merge_from_dict(dict([option.split('=')]))
    init_default_scope('mmpretrain')
    wrapper = build_optim_wrapper(nn.Linear(1, 1), config.optim_wrapper)
    assert type(wrapper) is OptimWrapper
    assert wrapper.clip_grad_kwargs == {'max_norm': 5.0}


@pytest.mark.parametrize(
    ('path', 'rate_of'),
    [
        (CONFIGS / 'finetune_mask_rcnn_sm_t.py', 2),
        (CONFIGS / 'finetune_mask_rcnn_sm_t_4ch.py', 2),
        (CONFIGS / 'finetune_upernet_sm_t.py', 4),
        (CONFIGS / 'quickstart_mask_rcnn.py', 8),
        (CONFIGS / 'quickstart_upernet.py', 8),
        (CONFIGS.parent / 'docs' / 'own_data_config.py', 2),
        (CONFIGS.parent / 'docs' / 'own_segmentation_config.py', 4),
    ],
    ids=lambda value: getattr(value, 'stem', ''),
)
def test_scaling_the_rate_leaves_one_that_fits_one_gpu(path, rate_of):
    config = Config.fromfile(path)
    assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == rate_of
    optimizer = build_optim_wrapper(nn.Linear(1, 1), config.optim_wrapper)
    Runner.scale_lr(
        SimpleNamespace(
            _train_dataloader=config.train_dataloader,
            world_size=1,
            logger=MMLogger.get_instance('scale'),
            param_schedulers=[],
        ),
        optimizer,
        {**config.auto_scale_lr, 'enable': True},
    )
    assert {group['lr'] for group in optimizer.param_groups} == {config.optim_wrapper.optimizer.lr}


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_every_config_can_scale_its_rate(path):
    """mmdet's --auto-scale-lr refuses a config that lacks one of the two keys."""
    rule = Config.fromfile(path).auto_scale_lr
    assert rule.enable is False
    assert rule.base_batch_size > 0


@each_name
def test_mask_rcnn_1x_is_the_published_recipe(name):
    config = Config.fromfile(CONFIGS / f'mask_rcnn_{name}_t.py')
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    assert optimizer_of(config) == ('AdamW', 1e-4, (0.9, 0.999), 0.05)
    warm_up, steps = config.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.by_epoch, warm_up.end) == ('LinearLR', 0.001, False, 1000)
    assert (steps.type, steps.milestones, steps.gamma, steps.end) == ('MultiStepLR', [8, 11], 0.1, 12)
    assert config.train_cfg.max_epochs == 12
    transforms = {transform.type: transform for transform in config.train_pipeline}
    assert tuple(transforms['Resize'].scale) == (1333, 800)
    assert transforms['Resize'].keep_ratio
    assert transforms['RandomFlip'].prob == 0.5
    assert config.model.backbone.drop_path_rate == 0.2
    assert config.train_dataloader.dataset.data_root == 'data/coco/'


class Detector(nn.Module):
    """A backbone and a head with the kinds of parameters that heads have."""

    def __init__(self, name):
        super().__init__()
        arch = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}
        self.backbone = SpatialMamba(arch) if name == 'sm' else VMamba({**arch, 'ssm_ratio': 2})
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))


def decayed_names(config_name, name):
    config = Config.fromfile(CONFIGS / config_name)
    init_default_scope('mmdet')
    model = Detector(name)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert set(names.values()) == {0.0, config.optim_wrapper.optimizer.weight_decay}
    return {name for name, value in names.items() if value}


@each_name
def test_no_decay_on_norms_and_vectors(name):
    spared = ('A_log', 'dt_bias')
    expected = {
        parameter_name
        for parameter_name, parameter in Detector(name).named_parameters()
        if parameter.ndim > 1 and not parameter_name.endswith(spared)
    }
    assert decayed_names(f'mask_rcnn_{name}_t.py', name) == expected
    kinds = {'sm': {'weight', 'dt_weight', 'dwconv_d1', 'dwconv_d3', 'dwconv_d5'}, 'vmamba': {'weight', 'dt_weight'}}
    assert {parameter_name.rsplit('.', 1)[-1] for parameter_name in expected} == kinds[name]


def test_published_decay_exempts_what_is_named_norm_in_the_original():
    names = (name for name, _ in Detector('sm').named_parameters())
    expected = {name for name in names if 'norm' not in SPATIAL_MAMBA.to_official(name.removeprefix('backbone.'))}
    assert decayed_names('mask_rcnn_sm_t_published_decay.py', 'sm') == expected
    assert 'backbone.stages.0.blocks.0.norm1.weight' in expected
    assert 'backbone.out_norms.1.weight' not in expected


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert mmspatialmamba.__version__ == version('mmspatialmamba')
