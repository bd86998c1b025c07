"""Spatial-Mamba: parameters, initial values, and what its blocks leave behind (tests/test_promises.py has the rest)."""

import math

import pytest
import torch
from torch import nn

from mmspatialmamba import SpatialMamba
from mmspatialmamba.models.ssm import StructureAwareSSM


@pytest.mark.parametrize(
    ('arch', 'millions'), [('tiny', 26.24), ('t', 26.24), ('small', 42.56), ('s', 42.56), ('base', 94.98), ('b', 94.98)]
)
def test_number_of_parameters(arch, millions):
    with torch.device('meta'):
        model = SpatialMamba(arch)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_initial_values():
    torch.manual_seed(0)
    model = SpatialMamba('tiny')
    for name, parameter in ((name, p.detach()) for name, p in model.named_parameters()):
        leaf = name.rsplit('.', 1)[-1]
        if leaf in ('A_log',):
            assert not parameter.any(), name
        elif leaf in ('D', 'alpha', 'dwconv_d1', 'dwconv_d3', 'dwconv_d5'):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif leaf == 'dt_weight':
            assert parameter.abs().max() <= parameter.shape[1] ** -0.5, name
            assert parameter.abs().max() > 0.9 * parameter.shape[1] ** -0.5, name
        elif leaf == 'dt_bias':
            step = nn.functional.softplus(parameter)
            assert step.min() >= 1e-3 * 0.999, name
            assert step.max() <= 1e-1 * 1.001, name
            assert step.log().mean() == pytest.approx(math.log(1e-2), abs=0.5), name
        elif leaf == 'bias' and ('mlp' in name or 'norm' in name):
            assert not parameter.any(), name
        elif 'norm' in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif any(part in name for part in ('in_proj', 'out_proj', 'fc1', 'fc2')):
            assert parameter.std() == pytest.approx(0.02, rel=0.05), name


def test_nothing_of_the_inner_width_is_cached():
    module = StructureAwareSSM(4)
    module(torch.randn(1, 3, 3, 4))
    assert set(module.state_fusion.__dict__) == set(nn.Module().__dict__)
