"""What the backbone computes is what its modules say: replaced, hooked, wrapped, quantized, adapted, frozen."""

import copy
import io
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision_setup  # noqa: F401
from changes import CONVOLUTIONS, LAYERS, SMALL, Adapter, Quantized, backbone, image, randomize, same, with_computation
from mmpretrain.models.peft import LoRAModel
from oracles import fusion_convolutions, relative_error, scan_loop
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmspatialmamba import SpatialMamba
from mmspatialmamba.models.block import Block
from mmspatialmamba.models.layers import Downsample, DropPath, Stem

# ---- layers of the same class with other options, layers of another class, changed weights


def convolve(layer, x):
    """The depthwise layer by PyTorch's own convolution, with what stands around it."""
    x = F.relu(x) if layer.relu_input else x
    y = nn.Conv2d.forward(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = {'none': lambda y: y, 'silu': lambda y: y * torch.sigmoid(y), 'relu': torch.relu}[layer.activation](y)
    return x + y if layer.residual else y


def norm(layer, x):
    if layer.weight is None:
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    bias = 0 if layer.bias is None else layer.bias
    return F.layer_norm(x, layer.normalized_shape, eps=layer.eps) * layer.weight + bias


def block_as_its_modules_say(block, x):
    """A block from its equation; linear layers and activations are called."""
    x = convolve(block.cpe1, x)
    ssm = block.ssm
    u, z = ssm.in_proj(norm(block.norm1, x)).chunk(2, -1)
    u = convolve(ssm.dwconv, u)
    dt, B, C = ssm.x_proj(u).split((ssm.rank, 1, 1), -1)
    delta = torch.log1p(torch.exp(dt @ ssm.dt_weight.T + ssm.dt_bias))
    h = scan_loop(u.flatten(1, 2), delta.flatten(1, 2), -torch.exp(ssm.A_log[:, 0]), B.flatten(1, 2)).view_as(u)
    kernels = [getattr(ssm.state_fusion, f'dwconv_d{dilation}') for dilation in (1, 3, 5)]
    y = fusion_convolutions(h, kernels, ssm.state_fusion.alpha) * C + ssm.D * u
    x = x + ssm.out_proj(norm(ssm.norm, y) * z * torch.sigmoid(z))
    x = convolve(block.cpe2, x)
    return x + block.mlp.fc2(block.mlp.act(block.mlp.fc1(norm(block.norm2, x))))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('change', LAYERS)
def test_a_block_computes_what_its_layers_say(change, training):
    torch.manual_seed(0)
    block = randomize(Block(8, 0.0)).train(training)
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    before = block(x)
    name, make = LAYERS[change]
    block.set_submodule(name, randomize(make()).train(training))
    out, expected = block(x), block_as_its_modules_say(block, x)
    assert relative_error(out, expected) < 1e-13  # measured at most 5e-15
    assert name == 'drop_path' or relative_error(out, before) > 1e-5
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), list(parameters.values()), retain_graph=True)
    gradients_expected = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    for parameter, one, other in zip(parameters, gradients, gradients_expected, strict=True):
        assert relative_error(one, other) < 1e-12, parameter  # measured at most 3e-14


@pytest.mark.parametrize('change', ['ssm.in_proj with a bias', 'mlp.act tanh', 'ssm.norm eps'])
def test_a_changed_block_compiles_to_the_same(change):
    torch._dynamo.reset()
    block = randomize(Block(8, 0.0))
    name, make = LAYERS[change]
    block.set_submodule(name, randomize(make()))
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    assert relative_error(compiled(x), block(x)) < 1e-14


def stem_as_its_modules_say(stem, x):
    x = F.relu(stem.reduce.norm(stem.reduce.conv(x)))
    first, _, second = stem.residual
    x = x + second.norm(second.conv(F.relu(first.norm(first.conv(x)))))
    return stem.project.norm(stem.project.conv(F.relu(stem.expand.norm(stem.expand.conv(x))))).permute(0, 2, 3, 1)


def downsample_as_its_modules_say(layer, x):
    x = convolve(layer.dwconv, layer.expand(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return layer.project.norm(layer.project.conv(x)).permute(0, 2, 3, 1)


@pytest.mark.parametrize('change', CONVOLUTIONS)
def test_stem_and_downsample_compute_what_their_layers_say_in_training_and_evaluation(change):
    model = backbone(norm_eval=True)
    before = model(image())
    name, make = CONVOLUTIONS[change]
    model.set_submodule(name, randomize(make(model.get_submodule(name))).eval())
    outputs = model(image())
    assert not torch.equal(outputs[3], before[3])
    assert same(model.train()(image()), outputs)
    x, part = image(), model.get_submodule(name.partition('.downsample')[0].partition('.')[0])
    if isinstance(part, Stem):
        assert relative_error(part(x), stem_as_its_modules_say(part, x)) < 1e-14
    else:
        layer = model.get_submodule(name[: name.index('downsample') + len('downsample')])
        assert isinstance(layer, Downsample)
        x = torch.randn(2, 5, 7, layer.expand.in_channels, dtype=torch.float64)
        assert relative_error(layer(x), downsample_as_its_modules_say(layer, x)) < 1e-14


def leaves():
    """Layers of the stem, one stage and one output: the other stages have the same."""
    return [
        name
        for name, module in with_computation(backbone()).items()
        if name.startswith(('stem', 'stages.1', 'out_norms.1')) and not list(module.children())
    ]


@pytest.mark.parametrize('name', leaves())
def test_a_replaced_layer_is_called(name):
    model = backbone(norm_eval=True)
    before = model(image())
    model.set_submodule(name, Adapter(model.get_submodule(name)))
    after = model(image())
    assert not same(after, before)
    assert same(model.train()(image()), after)


def test_another_norm_takes_the_observation_as_it_is_in_float16():
    """The factor that keeps y in the range of float16 belongs to `GatedNorm`, which takes it back."""
    torch.manual_seed(0)
    block, x = Block(8, 0.0), torch.randn(2, 5, 7, 8)

    class Gate(nn.Module):
        def forward(self, y, z):
            return y * torch.sigmoid(z)

    block.ssm.norm = Gate()
    with torch.no_grad():
        expected = block(x)
        with torch.autocast('cpu', torch.float16):
            assert relative_error(block(x), expected) < 2e-2  # measured: 1.5e-3


# ---- hooks and wrappers


@pytest.mark.parametrize('training', [False, True])
def test_wrapped_forwards_are_all_called(training):
    """Accelerate and its kin set ``forward`` on the instance."""
    model = backbone().train(training)
    expected, twin = model(image()), backbone().train(training)
    calls = Counter()
    for name, module in with_computation(twin).items():

        def forward(*args, name=name, inner=module.forward, **kwargs):
            calls[name] += 1
            return inner(*args, **kwargs)

        module.forward = forward
    assert same(twin(image()), expected)
    assert set(calls) == set(with_computation(twin))


HOOKS = {
    'forward': ('register_forward_hook', lambda name, calls: lambda module, args, out: calls.update([name])),
    'before': ('register_forward_pre_hook', lambda name, calls: lambda module, args: calls.update([name])),
    'backward': ('register_full_backward_hook', lambda name, calls: lambda module, dx, dout: calls.update([name])),
    'before backward': (
        'register_full_backward_pre_hook', lambda name, calls: lambda module, dout: calls.update([name]),
    ),
}  # fmt: skip


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', HOOKS)
def test_hooks_on_every_module_fire_and_change_nothing(kind, training):
    register, make = HOOKS[kind]
    model = backbone().train(training)
    twin, calls = copy.deepcopy(model), Counter()
    for name, module in with_computation(twin).items():
        getattr(module, register)(make(name, calls))
    results = []
    for one in (model, twin):
        outputs = one(image())
        gradients = torch.autograd.grad(sum((out**3).sum() for out in outputs), list(one.parameters()))
        results.append((*outputs, *gradients))
    assert same(*results)
    missing = set(with_computation(twin)) - set(calls)
    # PyTorch hands the last module before the loss no gradient of its input, as an image needs none; and a module
    # without inputs has none either.
    assert missing <= ({'', 'stem', 'stem.reduce', 'stem.reduce.conv'} if 'backward' in kind else set())


@pytest.mark.parametrize('training', [False, True])
def test_what_a_layer_returned_is_not_overwritten(training):
    model, returned, copies = backbone().train(training), {}, {}
    for name, module in with_computation(model).items():

        def keep(module, args, out, name=name):
            returned[name] = [leaf for leaf in tree_leaves(out) if leaf is not None]
            copies[name] = [leaf.clone() for leaf in returned[name]]

        module.register_forward_hook(keep)
    model(image())
    assert [name for name in returned if not same(returned[name], copies[name])] == []


@pytest.mark.parametrize('training', [False, True])
def test_hooks_on_all_modules_at_once_fire_and_change_nothing(training):
    model, calls = backbone().train(training), []
    twin = copy.deepcopy(model)
    expected = twin(image())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(module))
    try:
        assert same(model(image()), expected)
    finally:
        handle.remove()
    assert {id(module) for module in calls} >= {id(module) for module in with_computation(model).values()}


def test_a_hook_can_change_what_a_layer_returns():
    model = backbone()
    before = model(image())[3]
    handle = model.stages[1].blocks[0].ssm.state_fusion.register_forward_hook(lambda module, args, taps: 2 * taps)
    assert relative_error(model(image())[3], before) > 1e-4
    handle.remove()
    assert torch.equal(model(image())[3], before)


# ---- those who look: FLOPs, profiles, graphs


class Recorder(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ops_of(model, x):
    with Recorder() as recorder:
        model(x)
    return recorder.names


def test_the_path_does_not_depend_on_who_looks():
    model = backbone()
    expected, names = model(image()), ops_of(model, image())
    with FlopCounterMode(display=False) as counter:
        assert same(model(image()), expected)
    assert counter.get_total_flops() > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert same(model(image()), expected)
    profiled = {event.name for event in profile.events()}
    ours = {name.replace('.', '::', 1).removesuffix('.default') for name in names if 'mmspatialmamba' in name}
    assert len(ours) == 4
    assert ours <= profiled
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert ops_of(model, image()) == names
    finally:
        handle.remove()
    assert same(make_fx(model)(image())(image()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert same(torch.jit.trace(model, image())(image()), expected)


# ---- tensor subclasses, quantization, sharding


LINEAR = [f'{name}' for name in ('ssm.in_proj', 'ssm.x_proj', 'ssm.out_proj', 'mlp.fc1', 'mlp.fc2')]


@pytest.mark.parametrize('name', LINEAR)
def test_a_weight_may_be_a_tensor_subclass(name):
    model = backbone()
    layer = model.stages[1].blocks[0].get_submodule(name)
    scale = layer.weight.detach().abs().max() / 7
    numbers = (layer.weight.detach() / scale).round()
    with torch.no_grad():
        layer.weight.copy_(numbers * scale)
    expected = model(image())
    layer.weight = nn.Parameter(Quantized(numbers, scale), requires_grad=False)
    assert same(model(image()), expected)


def test_an_mlp_is_sharded_as_tensors_of_a_mesh():
    model = backbone()
    expected = model(image())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh('cpu', [0])
        plan = {
            f'stages.{stage}.blocks.0.mlp.{layer}': style()
            for stage in range(4)
            for layer, style in (('fc1', ColwiseParallel), ('fc2', RowwiseParallel))
        }
        parallelize_module(model, mesh, plan)
        for one, other in zip(model(image()), expected, strict=True):
            assert relative_error(one, other) < 1e-14
    finally:
        torch.distributed.destroy_process_group()


def test_dynamic_quantization_goes_through_a_state_dict():
    def quantize(seed):
        torch.manual_seed(seed)
        model = SpatialMamba(SMALL, drop_path_rate=0.0).eval()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch.ao.quantization is deprecated in favour of torchao
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    model, twin, file = quantize(0), quantize(1), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=False))
    assert same(twin(image().float()), model(image().float()))


# ---- adapters of a frozen backbone


class Products(TorchDispatchMode):
    """Counts the matrix products whose result has the shape of a weight, and ops of this package, in backward."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.found = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape in self.shapes:
            self.found.append(tuple(result.shape))
        return result


def test_lora_of_mmpretrain_trains_and_computes_no_gradient_for_frozen_weights():
    torch.manual_seed(0)
    config = {'type': 'mmspatialmamba.SpatialMamba', 'arch': SMALL, 'drop_path_rate': 0.0}
    targets = [{'type': 'in_proj'}, {'type': 'fc1'}]
    model = LoRAModel(config, alpha=4, rank=3, targets=targets).double()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 2 * sum(SMALL['depths'])
    for name, parameter in adapters.items():
        if 'lora_up' in name:
            nn.init.normal_(parameter)
    frozen = {p.shape for p in model.parameters() if p.ndim == 2 and not p.requires_grad}
    loss = sum((out**3).sum() for out in model(image()))
    with Products(frozen - {p.shape for p in adapters.values()}) as products:
        loss.backward()
    assert products.found == []
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_drop_path_drops_images_and_keeps_the_mean():
    drop_path = DropPath(0.25)
    x = torch.randn(4000, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert drop_path.eval()(x) is x
    torch.manual_seed(0)
    factor = drop_path.train()(x) / x
    assert torch.equal(factor.amin((1, 2)) > 0, factor.amax((1, 2)) > 0)  # whole images
    assert torch.allclose(factor[factor > 0], torch.tensor(1 / 0.75, dtype=torch.float64), rtol=1e-12)
    assert abs((factor[:, 0, 0] > 0).double().mean() - 0.75) < 0.03  # four times the deviation of the mean
    assert DropPath(0.0).train()(x) is x
    assert drop_path(x.bfloat16()).dtype == torch.bfloat16
    assert repr(drop_path) == 'DropPath(drop_prob=0.25)'
