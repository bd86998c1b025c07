"""The backbone against outputs and gradients that the original code computed in float64 (tests/data/README.md)."""

from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint
from oracles import rms_error

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA

DATA = Path(__file__).parent / 'data'
GOLDEN = torch.load(DATA / 'official_small_outputs.pth', weights_only=True)
CASES = [pytest.param(case, id=f'{case["mode"]}-{tuple(case["x"].shape)}') for case in GOLDEN['cases']]
# Ten times the largest relative root-mean-square error of a tensor: outputs 5.3e-15 and 4.3e-6, gradients 9.6e-15 and
# 1.4e-5 (here seven times), measured on AVX-512.
TOLERANCES = {torch.float64: 5.3e-14, torch.float32: 4.3e-5}
GRADIENT_TOLERANCES = {torch.float64: 9.6e-14, torch.float32: 1e-4}


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def backbone(dtype):
    model = SpatialMamba({'embed_dims': GOLDEN['dims'], 'depths': GOLDEN['depths']}, drop_path_rate=0.0)
    load_checkpoint(model, str(DATA / 'official_small_detector.pth'), map_location='cpu')
    return model.to(dtype)


@pytest.mark.parametrize('case', CASES)
def test_outputs(backbone, dtype, case):
    backbone.train(case['mode'] == 'train')
    outputs = backbone(case['x'].to(dtype))
    assert len(outputs) == len(case['outs']) == 4
    for actual, expected in zip(outputs, case['outs'], strict=True):
        assert actual.is_contiguous()
        assert rms_error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('case', [case for case in CASES if case.values[0].get('weights') is not None])
def test_gradients(backbone, dtype, case):
    backbone.train()
    x = case['x'].to(dtype).requires_grad_()
    terms = zip(backbone(x), case['weights'], strict=True)
    loss = sum((out * weight.to(dtype)).sum() / out.numel() ** 0.5 for out, weight in terms)
    loss.backward()
    assert loss.item() == pytest.approx(case['loss'], rel=TOLERANCES[dtype])
    assert rms_error(x.grad, case['dx']) < GRADIENT_TOLERANCES[dtype]
    parameters = dict(backbone.named_parameters())
    assert case['grads']
    for name, expected in case['grads'].items():
        assert rms_error(parameters[SPATIAL_MAMBA.to_own(name)].grad, expected) < GRADIENT_TOLERANCES[dtype], name
