"""Configs as the original repository writes them: its backbone's name and arguments on Swin's configs."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmspatialmamba.models import MMVSSM, MMSpatialMamba, SpatialMamba, VMamba

CONFIGS = Path(__file__).parents[1] / 'configs'
LOG = 'mmspatialmamba.models.original_arguments.print_log'

TINY = {'dims': 64, 'depths': (2, 4, 8, 4), 'drop_path_rate': 0.2}
SMALL = {'dims': 64, 'depths': (2, 4, 21, 5), 'drop_path_rate': 0.3}
BASE = {'dims': 96, 'depths': (2, 4, 21, 5), 'drop_path_rate': 0.5}
NECK = 'neck=dict(in_channels=[64, 128, 256, 512])'
HEADS = 'decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256)'
ONCE = 'mmdet/.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
THRICE = 'mmdet/.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
UPERNET = 'mmseg/.mim/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

V_TINY = {'dims': 96, 'depths': (2, 2, 8, 2), 'drop_path_rate': 0.2, 'ssm_ratio': 1.0}
V_SMALL = {'dims': 96, 'depths': (2, 2, 15, 2), 'drop_path_rate': 0.3, 'ssm_ratio': 2.0}
V_BASE = {'dims': 128, 'depths': (2, 2, 15, 2), 'drop_path_rate': 0.6, 'ssm_ratio': 2.0}
V_NECK = 'neck=dict(in_channels=[128, 256, 512, 1024])'
V_HEADS = 'decode_head=dict(in_channels=[128, 256, 512, 1024]), auxiliary_head=dict(in_channels=512)'

BACKBONES = {
    'sm': "type='MM_SpatialMamba', d_state=1, mlp_ratio=4.0, norm_layer='ln'",
    'vmamba': (
        "type='MM_VSSM', ssm_d_state=1, ssm_dt_rank='auto', ssm_conv=3, ssm_conv_bias=False, forward_type='v05_noz', "
        "mlp_ratio=4.0, downsample_version='v3', patchembed_version='v2', norm_layer='ln2d'"
    ),
}
"""What all configs of an original state of their backbone."""

ORIGINALS = {
    # config of this project: base, sizes, what the widths of neck and heads add, published millions of parameters
    'mask_rcnn_sm_t': (ONCE, TINY, NECK, 46),
    'mask_rcnn_sm_s': (ONCE, SMALL, NECK, 63),
    'mask_rcnn_sm_b': (ONCE, BASE, '', 115),  # as wide as Swin-T
    'mask_rcnn_sm_t_3x': (THRICE, TINY, NECK, 46),
    'mask_rcnn_sm_s_3x': (THRICE, SMALL, NECK, 63),
    'upernet_sm_t': (UPERNET, TINY, HEADS, 57),
    'upernet_sm_s': (UPERNET, SMALL, HEADS, 73),
    'upernet_sm_b': (UPERNET, BASE, '', 127),
    'mask_rcnn_vmamba_t': (ONCE, V_TINY, '', 49.755),
    'mask_rcnn_vmamba_s': (ONCE, V_SMALL, '', 69.654),
    'mask_rcnn_vmamba_b': (ONCE, V_BASE, V_NECK, 108),
    'mask_rcnn_vmamba_t_3x': (THRICE, V_TINY, '', 49.755),
    'mask_rcnn_vmamba_s_3x': (THRICE, V_SMALL, '', 69.654),
    'upernet_vmamba_t': (UPERNET, V_TINY, '', 61.902572),
    'upernet_vmamba_s': (UPERNET, V_SMALL, '', 81.801260),
    'upernet_vmamba_b': (UPERNET, V_BASE, V_HEADS, 122.069292),
}


def original(name, folder):
    """Writes a config in the original's form and reads it."""
    base, sizes, fitted, _ = ORIGINALS[name]
    package, _, path = base.partition('/')
    arguments = ', '.join(f'{key}={value!r}' for key, value in sizes.items())
    backbone = BACKBONES['vmamba' if 'vmamba' in name else 'sm']
    file = folder / 'original.py'
    file.write_text(
        f'_base_ = [__import__({package!r}).__path__[0] + "/{path}"]\n'
        'custom_imports = dict(imports=["mmspatialmamba"], allow_failed_imports=False)\n'
        'model = dict(\n'
        f"    backbone=dict({backbone}, out_indices=(0, 1, 2, 3), pretrained='', {arguments}),\n"
        f'    {fitted}\n'
        ')\n'
    )
    return Config.fromfile(file)


def build(config):
    init_default_scope(config.default_scope)
    with torch.device('meta'), mock.patch(LOG) as log:
        return MODELS.build(config.model), log


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize('name', ORIGINALS)
def test_original_config_builds_the_published_model(name, tmp_path):
    config = original(name, tmp_path)
    model, log = build(config)
    ours, _ = build(Config.fromfile(CONFIGS / f'{name}.py'))
    assert shapes(model) == shapes(ours)
    found, published = sum(p.numel() for p in model.parameters()) / 1e6, ORIGINALS[name][3]
    assert (round(found) if isinstance(published, int) else found) == pytest.approx(
        published, abs=0.6 if isinstance(published, int) else 5e-4
    )
    rates = [
        [block.drop_path.drop_prob for stage in m.backbone.stages for block in stage.blocks] for m in (model, ours)
    ]
    assert rates[0] == rates[1]
    assert model.backbone.init_cfg is None
    log.assert_called_once()
    said = log.call_args.args[0]
    for key in config.model.backbone:
        is_left_over = key in ('embed_dims', 'num_heads', 'window_size', 'convert_weights', 'act_cfg', 'init_cfg')
        assert is_left_over <= (key in said), key


def backbone(**arguments):
    with torch.device('meta'):
        return MMSpatialMamba(dims=8, depths=(1, 1, 1, 1), **arguments)


def test_arguments_that_are_no_choice():
    for value in ({'d_state': 1}, {'mlp_ratio': 4}, {'norm_layer': 'LN'}, {'patch_size': 4}, {'drop_rate': 0.0}):
        backbone(**value)
    for name, value in {
        'd_state': 16,
        'mlp_ratio': 2.0,
        'norm_layer': 'bn',
        'patch_size': 16,
        'drop_rate': 0.1,
        'attn_drop_rate': 0.1,
        'dt_init': 'constant',
    }.items():
        with pytest.raises(ValueError, match=f'MM_SpatialMamba: {name} must be .*, got {value!r}: .'):
            backbone(**{name: value})
    with pytest.raises(ValueError, match=r'dims must double from stage to stage, got \[8, 16, 32, 48\]'):
        MMSpatialMamba(dims=[8, 16, 32, 48])
    with pytest.raises(TypeError, match='unknown argument recompute: neither one of the original nor left over'):
        backbone(recompute=True)


def test_arguments_that_are_a_choice():
    with mock.patch(LOG) as log:
        model = backbone(in_chans=4, use_checkpoint=True, frozen_stages=1, norm_eval=True, pretrained='file.pth')
    log.assert_not_called()
    assert isinstance(model, SpatialMamba)
    assert (model.with_cp, model.frozen_stages, model.norm_eval) == (True, 1, True)
    assert model.init_cfg == {'type': 'Pretrained', 'checkpoint': 'file.pth'}
    assert model.stem.reduce.conv.in_channels == 4
    with torch.device('meta'):
        assert MMSpatialMamba(dims=[8, 16, 32, 64], depths=[1, 1, 1, 1]).channels == (8, 16, 32, 64)


VSSM = {'ssm_d_state': 1, 'ssm_conv_bias': False, 'forward_type': 'v05_noz', 'downsample_version': 'v3',
        'patchembed_version': 'v2'}  # fmt: skip


def vssm(**arguments):
    with torch.device('meta'):
        return MMVSSM(dims=8, depths=(1, 1, 1, 1), **{**VSSM, **arguments})


def test_arguments_of_vmamba_that_are_no_choice():
    for value in ({'norm_layer': 'LN2D'}, {'norm_layer': 'ln'}, {'gmlp': False}, {'posembed': False, 'imgsize': 512}):
        vssm(**value)
    for name, value in {
        'ssm_d_state': 16,
        'ssm_conv_bias': True,
        'forward_type': 'v0',
        'downsample_version': 'v1',
        'patchembed_version': 'v1',
        'ssm_dt_rank': 6,
        'norm_layer': 'bn',
        'mlp_ratio': 2.0,
        'posembed': True,
    }.items():
        with pytest.raises(ValueError, match=f'MM_VSSM: {name} must be .*, got {value!r}: .'):
            vssm(**{name: value})
    for name in VSSM:  # where the original's default is that of its first generation
        with pytest.raises(ValueError, match=f"MM_VSSM: {name} must be .*, got none, for which the original's default"):
            MMVSSM(**{key: value for key, value in VSSM.items() if key != name})
    with pytest.raises(ValueError, match=r"arch\['ssm_ratio'\] must be an integer of at least 1, got 1.5"):
        vssm(ssm_ratio=1.5)
    with pytest.raises(TypeError, match='MM_VSSM: unknown argument recompute'):
        vssm(recompute=True)


def test_arguments_of_vmamba_that_are_a_choice():
    with mock.patch(LOG) as log:
        model = vssm(in_chans=4, use_checkpoint=True, frozen_stages=1, pretrained='file.pth', ssm_ratio=1.0)
    log.assert_not_called()
    assert isinstance(model, VMamba)
    assert (model.with_cp, model.frozen_stages, model.arch['ssm_ratio']) == (True, 1, 1)
    assert model.init_cfg == {'type': 'Pretrained', 'checkpoint': 'file.pth'}


def test_keys_of_an_inherited_resnet_have_no_effect():
    left_over = {'depth': 50, 'num_stages': 4, 'style': 'pytorch', 'norm_cfg': {'type': 'BN'}}
    inherited = {'frozen_stages': 1, 'norm_eval': True, 'init_cfg': {'type': 'Pretrained', 'checkpoint': 'resnet.pth'}}
    with mock.patch(LOG) as log:
        model = backbone(**left_over, **inherited)
    assert (model.frozen_stages, model.norm_eval, model.init_cfg) == (-1, False, None)
    said = log.call_args.args[0]
    assert 'depth, norm_cfg, num_stages, style, frozen_stages, norm_eval, init_cfg' in said
