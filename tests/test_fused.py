"""Fused backbones: equal to layered ones, with the same parameters; what would go unnoticed is refused by name."""

import copy
import io
import pickle

import pytest
import torch
import torchvision_setup  # noqa: F401
from changes import CONVOLUTIONS, LAYERS, SMALL, Adapter, Quantized, backbone, image, randomize, same
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpretrain.models.peft import LoRAModel
from oracles import relative_error, rms_error
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from mmspatialmamba import SpatialMamba, fuse, unfuse
from mmspatialmamba.models.block import Block
from mmspatialmamba.models.fused import FusedBlock, FusedConvNorm, Held
from mmspatialmamba.models.layers import ConvNorm

BLOCK = 'stages.0.blocks.0'


def block_of(model):
    return model.get_submodule(BLOCK)


def results(model, x):
    outputs = model(x)
    loss = sum((out**3).sum() for out in outputs)
    return *outputs, *torch.autograd.grad(loss, list(model.parameters()))


# ---- values


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_fused_equals_layered(training, drop_path_rate):
    torch.manual_seed(0)
    layered = randomize(SpatialMamba(SMALL, drop_path_rate=drop_path_rate)).train(training)
    fused, x = fuse(copy.deepcopy(layered)), image(batch=4)
    found = []
    for model in (layered, fused):
        torch.manual_seed(1)
        found.append(results(model, x))
    names = [*range(4), *(name for name, _ in layered.named_parameters())]
    for name, expected, actual in zip(names, *found, strict=True):
        # A bias before BatchNorm has no gradient but rounding in training.
        scale = 1 if training and str(name).endswith('project.conv.bias') else None
        assert rms_error(actual, expected, scale) < 1e-12, name  # measured at most 5e-14


# Dtype of the model, autocast's, and the tolerance: at most ten times the largest relative root mean square error of a
# tensor, map or gradient, against the layers in float64, which was 7.8e-16, 8.9e-7, 1.9e-2, 1.4e-2 and 2.6e-3, and
# below 5e-2 in any case, so that a gradient scaled by 1.05 does not pass.
PRECISIONS = {
    'float64': (torch.float64, None, 7.8e-15),
    'float32': (torch.float32, None, 8.9e-6),
    'bfloat16': (torch.bfloat16, None, 4.5e-2),
    'autocast bfloat16': (torch.float32, torch.bfloat16, 4.5e-2),
    'autocast float16': (torch.float32, torch.float16, 2.6e-2),
}


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_fused_block_equals_the_layers_in_float64(precision):
    dtype, cast, tolerance = PRECISIONS[precision]
    torch.manual_seed(0)
    block = randomize(Block(24, 0.0))
    # In bfloat16 alone PyTorch's LayerNorm sums the gradient of its weight over tokens in bfloat16, layer or not.
    grid = (5, 7) if dtype == torch.bfloat16 else (12, 20)
    x = torch.randn(2, *grid, 24, dtype=torch.float64)
    dout = torch.randn_like(x)
    block.to(dtype).double()  # both compute with weights of this dtype
    x, dout = x.to(dtype), dout.to(dtype)
    found = []
    for model, exact in ((block, True), (fuse(copy.deepcopy(block).to(dtype)), False)):
        with torch.autocast('cpu', cast or torch.bfloat16, enabled=cast is not None and not exact):
            out = model(x.to(next(model.parameters()).dtype))
        found.append((out, *torch.autograd.grad(out, list(model.parameters()), dout.to(out.dtype))))
    names = ['out', *(name for name, _ in block.named_parameters())]
    errors = {name: rms_error(actual, expected) for name, expected, actual in zip(names, *found, strict=True)}
    assert max(errors.values()) < tolerance < 0.05, errors


@pytest.mark.parametrize('bias', [False, True])
def test_batchnorm_in_the_convolution_equals_the_two(bias):
    torch.manual_seed(0)
    layer = randomize(ConvNorm(3, 5, 3, stride=2, bias=bias)).eval()
    expected_layer = copy.deepcopy(layer)
    fuse(nn.Sequential(layer, Block(8, 0.0)))
    assert type(layer) is FusedConvNorm
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    actual, expected = layer(x), expected_layer(x)
    assert relative_error(actual, expected) < 1e-14  # measured: 9e-16
    gradients = torch.autograd.grad(actual.square().sum(), list(layer.parameters()))
    others = torch.autograd.grad(expected.square().sum(), list(expected_layer.parameters()))
    for one, other in zip(gradients, others, strict=True):
        assert relative_error(one, other) < 1e-13


def test_both_modes_and_compiled_give_the_same():
    torch._dynamo.reset()
    model, x = fuse(backbone(norm_eval=True)), image()
    expected = model(x)
    for one, other in zip(model.train()(x), expected, strict=True):
        assert torch.equal(one, other)
    compiled = torch.compile(model.eval(), backend='aot_eager', fullgraph=True)
    for one, other in zip(compiled(x), expected, strict=True):
        assert relative_error(one, other) < 1e-14


# ---- one set of parameters


def test_the_argument_builds_what_fuse_makes():
    torch.manual_seed(0)
    built = SpatialMamba(SMALL, fused=True)
    torch.manual_seed(0)
    made = fuse(SpatialMamba(SMALL))
    assert repr(built) == repr(made)
    assert all(torch.equal(one, other) for one, other in zip(built.parameters(), made.parameters(), strict=True))
    assert sum(isinstance(module, FusedBlock) for module in built.modules()) == sum(SMALL['depths'])
    with pytest.raises(TypeError, match='SpatialMamba: fused must be True or False, got 1'):
        SpatialMamba(SMALL, fused=1)


def test_names_parameters_and_optimizer_groups_stay():
    model = backbone()
    before, state = dict(model.named_parameters()), list(model.state_dict())
    rules = {'norm_decay_mult': 0.0, 'bias_decay_mult': 0.0, 'dwconv_decay_mult': 0.5, 'flat_decay_mult': 0.0}
    constructor = DefaultOptimWrapperConstructor(
        {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.05}}, rules
    )

    def decays():
        return [group['weight_decay'] for group in constructor(model).optimizer.param_groups]

    expected = decays()
    assert len(set(expected)) == 3
    fuse(model)
    assert decays() == expected
    assert list(model.state_dict()) == state
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    unfuse(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_state_dicts_load_both_ways():
    layered, fused = backbone(), fuse(SpatialMamba(SMALL, drop_path_rate=0.0).double()).eval()
    fused.load_state_dict(layered.state_dict())
    expected = layered(image())
    for one, other in zip(fused(image()), expected, strict=True):
        assert relative_error(one, other) < 1e-13
    other = SpatialMamba(SMALL, drop_path_rate=0.0).double().eval()
    other.load_state_dict(fused.state_dict())
    assert same(other(image()), expected)


def test_unfuse_takes_everything_back():
    model = backbone()
    expected, printed = model(image()), repr(model)
    fuse(model)
    assert fuse(model) is model
    assert repr(unfuse(model)) == printed
    assert same(model(image()), expected)
    assert unfuse(model) is model
    assert not any(isinstance(module, Held) for module in model.modules())


def test_copies_and_pickles():
    model = fuse(backbone())
    expected, buffer = model(image()), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for twin in twins:
        assert same(twin(image()), expected)
        with pytest.raises(RuntimeError, match=rf'{BLOCK}\.mlp\.act: cannot set approximate'):
            block_of(twin).mlp.act.approximate = 'tanh'
        unfuse(twin)


def train_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(out.square().mean() for out in model.train()(image())).backward()
    optimizer.step()


def assert_not_stale(model):
    twin = unfuse(copy.deepcopy(model)).eval()
    for one, other in zip(model.eval()(image()), twin(image()), strict=True):
        assert relative_error(one, other) < 1e-12


def test_evaluation_after_training_and_ema_is_not_stale():
    model = fuse(backbone())
    ema = ExponentialMovingAverage(model, momentum=0.5)
    before = model(image()), ema.module.eval()(image())
    train_a_step(model)
    ema.update_parameters(model)
    assert_not_stale(model)
    assert_not_stale(ema.module)
    assert not same(model(image()), before[0])
    assert not same(ema.module(image()), before[1])


def test_batch_norm_converts_to_sync_and_back():
    model = fuse(backbone())
    expected = model(image())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert same(model(image()), expected)
    with pytest.raises(RuntimeError, match=r'stem\.reduce\.norm: cannot register a hook'):
        model.stem.reduce.norm.register_forward_hook(print)
    model = revert_sync_batchnorm(model)
    assert same(model(image()), expected)
    assert same(fuse(unfuse(model))(image()), expected)


@pytest.mark.parametrize('frozen', [0, 2])
def test_frozen_stages_and_norm_eval(frozen):
    model = SpatialMamba(SMALL, frozen_stages=frozen, norm_eval=True, fused=True).train()
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(p.requires_grad for p in model.stem.parameters())
    before = copy.deepcopy(dict(model.named_buffers()))
    sum(out.square().mean() for out in model(image().float())).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_options_that_are_read_in_each_call_may_be_set():
    model, layered = fuse(backbone()), backbone()
    for one in (model, layered):
        block_of(one).norm1.eps = 0.5
        block_of(one).ssm.norm.eps = 0.25
        one.stem.reduce.norm.eps = 0.125
    for one, other in zip(model(image()), layered(image()), strict=True):
        assert relative_error(one, other) < 1e-13
    block_of(model).drop_path.drop_prob = 0.9999
    model.train()
    assert model(image())[3].isfinite().all()


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes, self.parameters = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.mmspatialmamba.mlp_backward.default, torch.ops.mmspatialmamba.ssm_layer_backward.default):
            self.parameters.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_a_frozen_backbone_computes_the_gradient_of_its_input_alone():
    layered = backbone().requires_grad_(False)
    model, x = fuse(copy.deepcopy(layered)), image().requires_grad_()
    found = []
    for one in (layered, model):
        loss = sum((out**3).sum() for out in one(x))
        with Products() as products:
            found.append(torch.autograd.grad(loss, x)[0])
    assert products.parameters == [False] * 2 * sum(SMALL['depths'])
    assert rms_error(found[1], found[0]) < 1e-12


# ---- what is refused


def short():
    """The stem, two stages and the downsample between them."""
    return backbone(out_indices=(1,))


HONOURED = ('cpe1 padding', 'cpe2 dilation', 'cpe2 without a bias', 'cpe1 parametrized', 'norm1 eps', 'ssm.norm eps')
"""Changes of layers that a fused block calls, and of options that it reads."""


@pytest.mark.parametrize('change', HONOURED)
def test_fuse_honours(change):
    model = short()
    name, make = LAYERS[change]
    model.set_submodule(f'{BLOCK}.{name}', randomize(make()).eval())
    expected = model(image())
    for one, other in zip(fuse(model)(image()), expected, strict=True):
        assert relative_error(one, other) < 1e-13


@pytest.mark.parametrize('change', [change for change in LAYERS if change not in HONOURED])
def test_fuse_refuses_a_changed_layer_by_name(change):
    model = short()
    name, make = LAYERS[change]
    model.set_submodule(f'{BLOCK}.{name}', make())
    before = repr(model)
    with pytest.raises(ValueError, match=rf'fuse: {BLOCK}\.{name}'):
        fuse(model)
    assert repr(model) == before


@pytest.mark.parametrize('change', [change for change in LAYERS if not change.startswith('cpe')])
def test_a_fused_block_refuses_a_replaced_layer_by_name(change):
    model = fuse(short())
    expected = model(image())
    name, make = LAYERS[change]
    with pytest.raises(RuntimeError, match=rf'{BLOCK}\.{name.partition(".")[0]}.*: cannot'):
        model.set_submodule(f'{BLOCK}.{name}', make())
    assert same(model(image()), expected)


@pytest.mark.parametrize('change', CONVOLUTIONS)
def test_stem_and_downsample_are_refused_or_honoured(change):
    model = backbone()
    name, make = CONVOLUTIONS[change]
    model.set_submodule(name, randomize(make(model.get_submodule(name))).eval())
    expected = model(image())
    if change == 'norm of another eps':
        for one, other in zip(fuse(model)(image()), expected, strict=True):
            assert relative_error(one, other) < 1e-13
    else:
        with pytest.raises(ValueError, match=rf'fuse: {name}'):
            fuse(model)
        assert same(model(image()), expected)
        fused = fuse(backbone())
        with pytest.raises(RuntimeError, match=rf'{name}: cannot replace'):
            fused.set_submodule(name, make(model.get_submodule(name)))


HELD = ('norm1', 'ssm', 'ssm.in_proj', 'ssm.dwconv', 'ssm.state_fusion', 'ssm.core', 'ssm.norm', 'mlp.act', 'drop_path')
HELD = (
    *(f'{BLOCK}.{name}' for name in HELD), 'stem.expand.conv',
    *(f'stages.0.downsample.{name}' for name in ('expand', 'dwconv', 'project.norm')),
)  # fmt: skip
HOOKS = (
    'register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
    'register_full_backward_pre_hook',
)  # fmt: skip


@pytest.mark.parametrize('register', HOOKS)
@pytest.mark.parametrize('name', HELD)
def test_hooks_are_refused_by_name(name, register):
    model = short()
    layered = model.get_submodule(name)
    handle = getattr(layered, register)(lambda *_: None)
    with pytest.raises(ValueError, match=rf'fuse: {name} must have no hook'):
        fuse(model)
    handle.remove()
    with pytest.raises(RuntimeError, match=rf'{name}: cannot register a hook'):
        getattr(fuse(model).get_submodule(name), register)(lambda *_: None)


@pytest.mark.parametrize('name', HELD)
def test_a_forward_of_its_own_is_refused_by_name(name):
    model = short()
    layer = model.get_submodule(name)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=rf'fuse: {name}\.forward must be as built'):
        fuse(model)
    del layer.forward
    with pytest.raises(RuntimeError, match=rf'{name}: cannot set forward'):
        fuse(model).get_submodule(name).forward = print


@pytest.mark.parametrize('name', [BLOCK, 'stem.reduce'])
def test_a_forward_of_a_block_or_a_pair_of_its_own_is_refused_by_name(name):
    model = short()
    layer = model.get_submodule(name)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=f'fuse: {name} must have the forward of its class'):
        fuse(model)


WAYS = {
    'call': (lambda layer: layer(torch.zeros(1, 1, 1, 8)), 'cannot call'),
    'prune': (lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), 'cannot register'),
    'parametrize': (lambda layer: parametrizations.weight_norm(layer), 'cannot delete weight'),
    'tensor subclass': (
        lambda layer: setattr(
            layer, 'weight', nn.Parameter(Quantized(layer.weight.detach(), torch.ones(())), requires_grad=False)
        ),
        'cannot set weight to a Quantized',
    ),
    'no bias': (lambda layer: setattr(layer, 'bias', None), 'cannot set bias to a NoneType'),
    'option': (lambda layer: setattr(layer, 'qconfig', 'int8'), 'cannot set qconfig'),
    'child': (lambda layer: layer.add_module('lora', nn.Identity()), 'cannot replace lora'),
}


@pytest.mark.parametrize('way', WAYS)
def test_what_would_go_unnoticed_is_refused_by_name(way):
    model = fuse(short())
    expected = model(image())
    change, message = WAYS[way]
    with pytest.raises(RuntimeError, match=rf'{BLOCK}\.mlp\.fc1: {message}.*unfuse\(model\)'):
        change(model.get_submodule(f'{BLOCK}.mlp.fc1'))
    assert same(model(image()), expected)


@pytest.mark.parametrize('name', ['ssm.in_proj', 'mlp.fc2'])
def test_fuse_refuses_a_tensor_subclass_by_name(name):
    model = short()
    layer = model.get_submodule(f'{BLOCK}.{name}')
    layer.weight = nn.Parameter(Quantized(layer.weight.detach(), torch.ones(())), requires_grad=False)
    with pytest.raises(ValueError, match=rf'fuse: {BLOCK}\.{name}\.weight must be a Parameter .*, got a Quantized'):
        fuse(model)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_lora_and_quantize_dynamic_are_refused_by_name():
    config = {'type': 'mmspatialmamba.SpatialMamba', 'arch': SMALL, 'fused': True}
    with pytest.raises(RuntimeError, match=rf'{BLOCK}\.mlp: cannot set fc1'):
        LoRAModel(config, alpha=4, rank=3, targets=[{'type': 'fc1'}])
    with pytest.raises(RuntimeError, match=r'stem\.reduce\.conv: cannot set qconfig'):
        torch.ao.quantization.quantize_dynamic(fuse(short()), {nn.Linear}, dtype=torch.qint8)


def test_an_adapter_is_refused_by_name():
    model = fuse(short())
    with pytest.raises(RuntimeError, match=rf'{BLOCK}\.ssm: cannot set in_proj'):
        block_of(model).ssm.in_proj = Adapter(block_of(model).ssm.in_proj)


class OwnBlock(Block):
    """A block that somebody changed."""


def test_models_without_blocks_and_with_others_are_refused():
    with pytest.raises(ValueError, match='fuse: expected a model with blocks of Spatial-Mamba, found none in Linear'):
        fuse(nn.Linear(3, 3))
    model = short()
    model.set_submodule(BLOCK, OwnBlock(8, 0.0))
    with pytest.raises(ValueError, match=rf'fuse: {BLOCK} must be a Block, Downsample or ConvNorm, got OwnBlock'):
        fuse(model)
