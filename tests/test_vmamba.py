"""VMamba: architectures, initial values, dtypes, modules that are called (tests/test_promises.py has the rest)."""

import math

import pytest
import torch
from torch import nn

from mmspatialmamba import VMamba, fuse
from mmspatialmamba.models.layers import LayerNorm
from mmspatialmamba.models.vmamba import SS2D, SelectiveScan

SMALL = {'embed_dims': 8, 'depths': (1, 1, 2, 1), 'ssm_ratio': 2}

# With a classifier of 1000 classes instead of the four output norms, as its authors count.
PUBLISHED = {
    'tiny': 30_249_064,
    'small': 50_147_752,
    'base': 88_557_800,
    'tiny_s2l5': 30_705_832,
    'small_s1l20': 49_012_840,
    'base_s1l20': 86_614_504,
}
BACKBONES = {'t': 29_481_408, 's': 49_380_096, 'b': 87_534_592}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('arch', PUBLISHED)
def test_number_of_parameters(arch):
    with torch.device('meta'):
        model = VMamba(arch, out_indices=(3,))
    assert count(model) + 1000 * (model.channels[3] + 1) == PUBLISHED[arch]
    assert VMamba.ARCHITECTURES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize('letter', BACKBONES)
def test_the_first_letter_names_the_papers_model(letter):
    with torch.device('meta'):
        assert count(VMamba(letter)) == BACKBONES[letter]


def test_initial_values():
    torch.manual_seed(0)
    model = VMamba('tiny')
    for name, parameter in ((name, p.detach()) for name, p in model.named_parameters()):
        leaf = name.rsplit('.', 1)[-1]
        if leaf == 'A_log':
            assert not parameter.any(), name
        elif leaf == 'D':
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif leaf == 'dt_weight':
            assert parameter.abs().max() <= parameter.shape[-1] ** -0.5, name
            assert parameter.abs().max() > 0.9 * parameter.shape[-1] ** -0.5, name
        elif leaf == 'dt_bias':
            step = nn.functional.softplus(parameter)
            assert step.min() >= 1e-3 * 0.999, name
            assert step.max() <= 1e-1 * 1.001, name
            assert step.log().mean() == pytest.approx(math.log(1e-2), abs=0.5), name
            assert len(set(step[:, 0].tolist())) == 4, name  # drawn anew for each order
        elif 'x_proj' in name:  # the default of a linear layer, for each order
            assert parameter.abs().max() <= parameter.shape[1] ** -0.5, name
            assert parameter.std() == pytest.approx((3 * parameter.shape[1]) ** -0.5, rel=0.05), name
        elif leaf == 'bias' and ('mlp' in name or 'norm' in name):
            assert not parameter.any(), name
        elif 'norm' in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif any(part in name for part in ('in_proj', 'out_proj', 'fc1', 'fc2')):
            assert parameter.std() == pytest.approx(0.02, rel=0.05), name


def test_every_norm_has_the_eps_of_the_original():
    norms = [module for module in VMamba(SMALL).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 + 3 + 5 * 3 + 4
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize('ratio', [0, 1.5, '2', None])
def test_a_ratio_that_is_not_allowed(ratio):
    with pytest.raises(ValueError, match=r"VMamba: arch\['ssm_ratio'\] must be an integer of at least 1, got"):
        VMamba({**SMALL, 'ssm_ratio': ratio})


def test_it_is_not_fused():
    with pytest.raises(TypeError, match='VMamba: unknown argument fused'):
        VMamba(SMALL, fused=True)
    with pytest.raises(ValueError, match='fuse: expected a model with blocks of Spatial-Mamba, found none in VMamba'):
        fuse(VMamba(SMALL))


def test_every_module_is_called():
    model = VMamba(SMALL).eval()
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(1, 3, 40, 56))
    containers = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    assert {name for name, _ in model.named_modules()} - containers == called


def test_a_layer_may_be_replaced():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    module = SS2D(8, 2)
    x = torch.randn(1, 5, 6, 8)
    before = module(x)
    doubled = Doubled(16, 8, bias=False)
    doubled.load_state_dict(module.out_proj.state_dict())
    module.out_proj = doubled
    assert torch.allclose(module(x), 2 * before)


def test_a_hook_on_the_scan_sees_the_arguments_of_the_op():
    module, seen = SS2D(32, 2), []
    module.scan.register_forward_hook(lambda _, args, y: seen.extend([*args, y]))
    module(torch.randn(2, 5, 6, 32))
    assert [tuple(x.shape) for x in seen] == [
        (2, 5, 6, 64), (2, 5, 6, 4, 2), (2, 5, 6, 4, 1), (2, 5, 6, 4, 1),
        (4, 64, 2), (4, 64), (4, 64, 1), (4, 64), (2, 5, 6, 64),
    ]  # fmt: skip
    assert SelectiveScan.ORDERS == ('rows', 'columns', 'rows_backwards', 'columns_backwards')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    torch.manual_seed(0)
    model = VMamba(SMALL).eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (LayerNorm, SelectiveScan)):
            module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: y.dtype}))
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    block = 'stages.0.blocks.0'
    assert seen[f'{block}.norm1'] == seen[f'{block}.ss2d.scan'] == seen[f'{block}.ss2d.norm'] == dtype
    for found, expected in zip(outputs, model(x), strict=True):
        assert found.isfinite().all()
        assert (found - expected).abs().max() < 0.2  # of values up to 3; bfloat16 has 8 bits


def test_an_image_depends_on_the_padding_of_its_batch():
    """A property of the network (docs/which_backbone.md): positions of padding are scanned too, in two orders first."""
    torch.manual_seed(0)
    model = VMamba(SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    alone, padded = model(x), model(nn.functional.pad(x, (0, 64)))
    for one, other in zip(alone, padded, strict=True):
        assert (one - other[..., : one.shape[-1]]).abs().max() > 1e-3
