"""Official and own parameter names: one table, both ways, applied when a state dict is loaded."""

import pytest
import torch
from families import FAMILIES, each_family, each_golden_set
from mmengine.logging import MMLogger

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA

SPATIAL, VMAMBA = FAMILIES[:2]
ARCH = SPATIAL.arch


def official_detector(family=SPATIAL):
    state = torch.load(family.detector, weights_only=True)['state_dict']
    return {name.removeprefix('backbone.'): tensor for name, tensor in state.items()}


@pytest.fixture
def log(caplog):
    """The messages of MMEngine's current logger."""
    logger = MMLogger.get_instance('test', log_level='INFO')
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@each_golden_set
def test_round_trip_is_lossless(family):
    state, names = official_detector(family), family.names
    own = {(name := names.to_own(official)): names.to_own_value(name, value) for official, value in state.items()}
    assert {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in family.build().state_dict().items()
    }
    again = {names.to_official(name): names.to_official_value(name, value) for name, value in own.items()}
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@each_family
def test_own_names_are_unchanged(family):
    for name, value in family.build().state_dict().items():
        assert family.names.to_own(name) == name
        assert family.names.to_own_value(name, value) is value
    for official, own in family.names.pairs:
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


@each_golden_set
def test_loads_official_names_with_plain_pytorch(family, log):
    model = family.build()
    model.load_state_dict(official_detector(family))
    official, names = official_detector(family), family.names
    for name, tensor in model.state_dict().items():
        assert torch.equal(names.to_official_value(name, tensor), official[names.to_official(name)])
    count = family.tensors
    assert f'{count} of {count} tensors matched, 0 missing, 0 unexpected, 0 of another shape.' in log.text


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


@each_family
def test_a_classifiers_norm_belongs_to_the_last_stage_alone(family):
    state = torch.load(family.classification, weights_only=True)['model']
    norm = 'norm.weight' if family is SPATIAL else 'classifier.norm.weight'
    state[norm] = torch.full_like(state[norm], 7.0)
    classifier, pyramid = family.build(out_indices=(3,)), family.build()
    for model in (classifier, pyramid):
        model.load_state_dict(state, strict=False)
    assert torch.equal(classifier.out_norms['3'].weight, state[norm])
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


def kernels_of(state, *layers):
    """Writes the weights of linear layers as those of 1x1 convolutions."""
    return {
        name: value[:, :, None, None] if name.endswith(tuple(f'{layer}.weight' for layer in layers)) else value
        for name, value in state.items()
    }


def test_linear_weights_may_be_kernels_of_1x1_convolutions():
    state, model = official_detector(VMAMBA), VMAMBA.build()
    state = kernels_of(state, 'in_proj', 'out_proj', 'fc1', 'fc2')
    assert sum(value.ndim == 4 for value in state.values()) == 5 + 5 * 5  # stem and downsamples; of five blocks
    model.load_state_dict(state)
    expected = VMAMBA.build()
    expected.load_state_dict(official_detector(VMAMBA))
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def first_generation(mixer, prefix=''):
    """Entries of a first-generation file: state size 16 and a gate, under the names of both versions of its code."""
    place = f'{prefix}layers.0.blocks.0.{mixer}'
    return {
        f'{place}.x_proj_weight': torch.zeros(4, 1 + 32, 32),
        f'{place}.dt_projs_weight': torch.zeros(4, 32, 1),
        f'{place}.A_logs': torch.zeros(128, 16),
        f'{place}.in_proj.weight': torch.zeros(64, 16),
        f'{place}.conv2d.weight': torch.zeros(32, 1, 3, 3),
        f'{prefix}layers.0.downsample.norm.weight': torch.zeros(64),
    }


@pytest.mark.parametrize('mixer', ['op', 'self_attention'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_the_first_generation_of_vmamba_is_refused_by_name(mixer, prefix):
    message = r'VMamba: the state dict cannot be loaded: .*A_logs belongs to another VMamba, with state size 16 '
    with pytest.raises(RuntimeError, match=message):
        VMAMBA.build().load_state_dict(first_generation(mixer, prefix), strict=False)
    outer = torch.nn.ModuleDict({'backbone': VMAMBA.build()})
    with pytest.raises(RuntimeError, match=message):
        outer.load_state_dict(first_generation(mixer, 'backbone.'), strict=False)
    gated = {**official_detector(VMAMBA), 'layers.0.blocks.0.op.in_proj.weight': torch.zeros(64, 16)}
    with pytest.raises(RuntimeError, match='another VMamba, with a gate, such as'):
        VMAMBA.build().load_state_dict(gated, strict=False)


@pytest.mark.parametrize('pair', [(SPATIAL, VMAMBA), (VMAMBA, SPATIAL)], ids=['into VMamba', 'into SpatialMamba'])
@pytest.mark.parametrize('layout', ['own', 'official'])
def test_the_other_backbone_of_this_package_is_refused(pair, layout):
    """Norms, MLPs and output norms have the same own names and shapes in both."""
    given, wanted = pair
    state = given.build().state_dict() if layout == 'own' else official_detector(given)
    with pytest.raises(RuntimeError, match=rf'{wanted.backbone.__name__}: the state dict holds another backbone'):
        wanted.build().load_state_dict(state, strict=False)
    outer = torch.nn.ModuleDict({'backbone': wanted.build()})
    with pytest.raises(RuntimeError, match='holds another backbone'):
        outer.load_state_dict({f'backbone.{name}': value for name, value in state.items()}, strict=False)


@each_family
def test_a_published_file_that_lacks_a_layer_is_refused(family):
    state = official_detector(family)
    (lacking,) = (name for name in state if name.endswith('layers.2.blocks.1.mlp.fc2.weight'))
    del state[lacking]
    counts = f'{family.tensors - 1} of {family.tensors} tensors matched, 1 missing'
    message = rf'{counts}(.|\n)*missing: {family.names.to_own(lacking)}'
    with pytest.raises(RuntimeError, match=message):
        family.build().load_state_dict(state, strict=False)
    larger = family.backbone({**family.arch, 'depths': (1, 1, 3, 1)})
    with pytest.raises(RuntimeError, match='tensors matched'):
        larger.load_state_dict(official_detector(family), strict=False)


@each_family
def test_what_was_added_to_a_model_may_be_missing_in_a_published_file(family):
    model = family.build()
    model.stages[0].blocks[0].mlp.adapter = torch.nn.Linear(2, 2)
    assert model.load_state_dict(official_detector(family), strict=False).missing_keys == [
        f'stages.0.blocks.0.mlp.adapter.{name}' for name in ('weight', 'bias')
    ]
