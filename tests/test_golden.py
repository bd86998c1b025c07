"""The backbones against outputs and gradients that the original code computed in float64 (tests/data/README.md)."""

import importlib.util

import pytest
import torch
import torchvision_setup  # noqa: F401
from families import FAMILIES, each_golden_set
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from oracles import rms_error

from mmspatialmamba import SpatialMamba, VMamba

GOLDEN = {family.files: torch.load(family.outputs, weights_only=True) for family in FAMILIES}
CASES = [
    pytest.param(family, case, id=f'{family.files}-{case["mode"]}-{tuple(case["x"].shape)}')
    for family in FAMILIES
    for case in GOLDEN[family.files]['cases']
]
# Ten times the largest relative root-mean-square error of a tensor, measured on AVX-512: outputs and gradients of
# Spatial-Mamba 5.3e-15, 9.6e-15 and in float32 4.3e-6, 1.4e-5 (here seven times); of VMamba 2.3e-15, 7.1e-15 and
# 1.0e-6, 3.0e-6.
TOLERANCES = {
    SpatialMamba: {torch.float64: (5.3e-14, 9.6e-14), torch.float32: (4.3e-5, 1e-4)},
    VMamba: {torch.float64: (2.3e-14, 7.1e-14), torch.float32: (1e-5, 3e-5)},
}


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    return request.param


def load(family, path, dtype, **arguments):
    model = family.build(drop_path_rate=0.0, **arguments)
    load_checkpoint(model, path, map_location='cpu')
    return model.to(dtype)


@each_golden_set
def test_small_models_are_those_of_the_files(family):
    golden = GOLDEN[family.files]
    assert (family.arch['embed_dims'], family.arch['depths']) == (golden['dims'], tuple(golden['depths']))
    assert family.arch.get('ssm_ratio') == golden.get('ssm_ratio')
    assert len(family.build().state_dict()) == family.tensors


@pytest.mark.parametrize(('family', 'case'), CASES)
def test_outputs(family, case, dtype):
    tolerance, _ = TOLERANCES[family.backbone][dtype]
    model = load(family, family.detector, dtype).train(case['mode'] == 'train')
    outputs = model(case['x'].to(dtype))
    assert len(outputs) == len(case['outs']) == 4
    for actual, expected in zip(outputs, case['outs'], strict=True):
        assert actual.is_contiguous()
        assert rms_error(actual, expected) < tolerance


@pytest.mark.parametrize(('family', 'case'), [case for case in CASES if case.values[1].get('weights') is not None])
def test_gradients(family, case, dtype):
    tolerance, gradient_tolerance = TOLERANCES[family.backbone][dtype]
    model = load(family, family.detector, dtype).train()
    x = case['x'].to(dtype).requires_grad_()
    terms = zip(model(x), case['weights'], strict=True)
    loss = sum((out * weight.to(dtype)).sum() / out.numel() ** 0.5 for out, weight in terms)
    loss.backward()
    assert loss.item() == pytest.approx(case['loss'], rel=tolerance)
    assert rms_error(x.grad, case['dx']) < gradient_tolerance
    parameters = dict(model.named_parameters())
    assert case['grads']
    for official, expected in case['grads'].items():
        name = family.names.to_own(official)
        expected = family.names.to_own_value(name, expected)
        assert rms_error(parameters[name].grad, expected) < gradient_tolerance, name


@pytest.mark.parametrize('family', FAMILIES[1:], ids=lambda family: family.files)
def test_classifier(family, dtype):
    """Both outputs of the original's classifier, from its file as it is, by a classifier of mmpretrain."""
    if importlib.util.find_spec('mmpretrain') is None:
        pytest.skip('needs mmpretrain')
    golden, (tolerance, _) = GOLDEN[family.files]['classifier'], TOLERANCES[family.backbone][dtype]
    config = {
        'type': 'ImageClassifier',
        'backbone': {'type': f'mmspatialmamba.{family.backbone.__name__}', 'arch': family.arch, 'out_indices': (3,)},
        'neck': {'type': 'GlobalAveragePooling'},
        'head': {
            'type': 'LinearClsHead',
            'num_classes': golden['logits'].shape[1],
            'in_channels': golden['map'].shape[1],
        },
    }
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config).eval()
    load_checkpoint(model, family.classification, map_location='cpu', strict=True)
    x = golden['x'].to(dtype)
    with torch.no_grad():
        (features,), logits = model.to(dtype).backbone(x), model(x)
    assert rms_error(features, golden['map']) < tolerance
    assert rms_error(logits, golden['logits']) < tolerance
