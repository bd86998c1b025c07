"""Official and own parameter names: one table, both ways, applied when a state dict is loaded."""

from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA

DATA = Path(__file__).parent / 'data'
ARCH = {'embed_dims': 16, 'depths': (1, 1, 2, 1)}


def official_detector():
    state = torch.load(DATA / 'official_small_detector.pth', weights_only=True)['state_dict']
    return {name.removeprefix('backbone.'): tensor for name, tensor in state.items()}


@pytest.fixture
def log(caplog):
    """The messages of MMEngine's current logger."""
    logger = MMLogger.get_instance('test', log_level='INFO')
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_round_trip_is_lossless():
    state = official_detector()
    own = {SPATIAL_MAMBA.to_own(name): tensor for name, tensor in state.items()}
    assert set(own) == set(SpatialMamba(ARCH).state_dict())
    again = {SPATIAL_MAMBA.to_official(name): tensor for name, tensor in own.items()}
    assert list(again) == list(state)
    assert all(again[name] is tensor for name, tensor in state.items())


def test_own_names_are_unchanged():
    for name in SpatialMamba(ARCH).state_dict():
        assert SPATIAL_MAMBA.to_own(name) == name
    for official, own in SPATIAL_MAMBA.pairs:
        assert official != own


def test_names_of_other_modules_are_unchanged():
    for name in (
        'rpn_head.rpn_conv.weight',
        'head.weight',
        'layers',
        'patch_embed.conv2.10.weight',
        'outnormal.weight',
    ):
        assert SPATIAL_MAMBA.to_own(name) == name


def test_loads_official_names_with_plain_pytorch(log):
    model = SpatialMamba(ARCH)
    model.load_state_dict(official_detector())
    official = official_detector()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, official[SPATIAL_MAMBA.to_official(name)])
    assert '206 of 206 tensors matched, 0 missing, 0 unexpected, 0 of another shape.' in log.text


def test_loads_official_names_inside_another_module():
    outer = torch.nn.ModuleDict({'backbone': SpatialMamba(ARCH)})
    outer.load_state_dict({f'backbone.{name}': tensor for name, tensor in official_detector().items()})
    assert torch.equal(outer['backbone'].out_norms['2'].weight, official_detector()['outnorm2.weight'])


def test_the_given_state_dict_is_not_changed():
    state = official_detector()
    names = list(state)
    SpatialMamba(ARCH).load_state_dict(state)
    assert list(state) == names


def test_the_log_names_what_does_not_fit(log):
    state = official_detector()
    state['layers.9.extra'] = state.pop('outnorm0.weight')
    state['outnorm1.weight'] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r'size mismatch for out_norms\.1\.weight'):
        SpatialMamba(ARCH).load_state_dict(state, strict=False)
    assert '204 of 206 tensors matched, 1 missing, 1 unexpected, 1 of another shape.' in log.text
    assert 'missing: out_norms.0.weight' in log.text
    assert 'unexpected: layers.9.extra' in log.text
    assert 'mismatched: out_norms.1.weight (expected (32,), found (3,))' in log.text


def test_a_classifiers_norm_belongs_to_the_last_stage_alone():
    state = torch.load(DATA / 'official_small_classification.pth', weights_only=True)['model']
    state['norm.weight'] = torch.full_like(state['norm.weight'], 7.0)
    classifier, pyramid = SpatialMamba(ARCH, out_indices=(3,)), SpatialMamba(ARCH)
    for model in (classifier, pyramid):
        model.load_state_dict(state, strict=False)
    assert torch.equal(classifier.out_norms['3'].weight, state['norm.weight'])
    assert torch.equal(pyramid.out_norms['3'].weight, torch.ones(128))


def test_a_state_dict_may_leave_the_backbone_out():
    outer = torch.nn.ModuleDict({'backbone': SpatialMamba(ARCH), 'head': torch.nn.Linear(1, 1)})
    result = outer.load_state_dict({'head.bias': torch.ones(1)}, strict=False)
    assert len([name for name in result.missing_keys if 'num_batches_tracked' not in name]) == 199
    assert outer['head'].bias == 1


def test_a_state_dict_of_another_backbone_raises():
    message = r'the state dict matches nothing: expected 206 tensors such as stem\.reduce\.conv\.weight.* found conv1'
    with pytest.raises(RuntimeError, match=message):
        SpatialMamba(ARCH).load_state_dict({'conv1.weight': torch.zeros(1)}, strict=False)


@pytest.mark.parametrize('out_indices', [(3,), (0, 1, 2, 3)])
def test_a_swin_file_under_its_authors_names_matches_nothing(out_indices):
    state = {  # names that the table knows the beginnings of, with shapes that fit
        'layers.0.blocks.0.norm1.weight': torch.zeros(16),
        'layers.0.blocks.0.mlp.fc1.weight': torch.zeros(64, 16),
        'norm.weight': torch.zeros(128),
    }
    with pytest.raises(RuntimeError, match=r'matches nothing.* found layers\.0\.blocks'):
        SpatialMamba(ARCH, out_indices=out_indices).load_state_dict(state, strict=False)
