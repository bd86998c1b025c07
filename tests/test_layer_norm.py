"""`layer_norm` and its module against the equation: values, gradients, dtypes, layouts, speed, faults and errors."""

import pytest
import torch
import torch.nn.functional as F
from mmspatialmamba.ops import layer_norm
from mmspatialmamba.ops.layer_norm.reference import layer_norm_backward_reference, layer_norm_reference
from oracles import GRIDS, norm_arguments, relative_error, require_grad
from oracles import layer_norm as norm_equation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmspatialmamba.models.layers import LayerNorm

OP = torch.ops.mmspatialmamba.layer_norm.default

# Ten times the largest relative error measured over GRIDS.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
AFFINE = [(True, True), (True, False), (False, False)]


def arguments_of(grid, channels=5, dtype=torch.float64, batch=2, affine=(True, True)):
    """x, weight and bias of `layer_norm`, None where they are not to be there."""
    x, _, *parameters = norm_arguments(grid, channels, dtype, batch)
    return x, *(parameter if exists else None for parameter, exists in zip(parameters, affine, strict=True))


def norm_loop(x, weight, bias, eps=1e-5):
    ones = x.new_ones(x.shape[-1])
    return norm_equation(x, ones if weight is None else weight, 0 * ones if bias is None else bias, eps)


def as_double(*tensors):
    return [tensor if tensor is None else tensor.detach().double() for tensor in tensors]


@pytest.mark.parametrize('affine', AFFINE)
@pytest.mark.parametrize('dtype', TOLERANCES)
def test_op_and_reference_equal_the_equation(dtype, affine):
    for grid in GRIDS:
        arguments = arguments_of(grid, dtype=dtype, affine=affine)
        expected = norm_loop(*as_double(*arguments))
        for out in (layer_norm(*arguments), layer_norm_reference(*arguments, 1e-5, dtype)[0]):
            assert out.dtype == dtype
            assert out.is_contiguous()
            assert relative_error(out.double(), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('affine', AFFINE)
def test_gradients(affine):
    """Those of the CPU are PyTorch's own, those of the backward op serve other devices."""
    arguments = [x if x is None else x.detach().requires_grad_() for x in arguments_of((2, 3), affine=affine)]
    leaves = [x for x in arguments if x is not None]

    def call(*tensors):
        return layer_norm(*tensors, *[None] * (3 - len(tensors)))

    assert torch.autograd.gradcheck(call, leaves)
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.autograd.grad(norm_loop(*arguments), leaves, dout)
    detached = [x if x is None else x.detach() for x in arguments]
    _, mean, inverse = layer_norm_reference(*detached, 1e-5, torch.float64)
    dx, dparameters = layer_norm_backward_reference(dout, detached[0], mean, inverse, *detached[1:])
    for one, other in zip((dx, *dparameters), expected, strict=False):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert not dparameters[len(leaves) - 1 :].any()


def test_the_autograd_formula_of_other_devices():
    """The CPU has an autograd of its own: the formula is looked at on the meta device, and its values by hand."""
    x, weight, bias = (tensor.to('meta').requires_grad_() for tensor in arguments_of((3, 4), dtype=torch.float32))
    out = layer_norm(x, weight, bias)
    assert 'NativeLayerNorm' not in type(out.grad_fn).__name__
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('affine', AFFINE)
def test_opcheck(dtype, affine):
    arguments = arguments_of((4, 5), dtype=dtype, affine=affine)
    arguments = [x if x is None else x.detach().requires_grad_() for x in arguments]
    torch.library.opcheck(OP, (*arguments, 1e-5, dtype))
    torch.library.opcheck(OP, (*arguments, 1e-5, torch.bfloat16))


def test_compiles_without_a_graph_break():
    arguments = require_grad(*arguments_of((4, 5)))
    compiled = torch.compile(layer_norm, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(layer_norm(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_the_compiler_of_a_cpu_sees_a_standard_layer():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    from torch._dynamo.backends.common import aot_autograd

    arguments = require_grad(*arguments_of((4, 5), dtype=torch.float32))
    torch.compile(layer_norm, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(*arguments)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == 'call_function'}
    assert 'aten.native_layer_norm.default' in targets
    assert not any('mmspatialmamba' in target for target in targets)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_sets_the_dtype_of_the_output(dtype):
    x, weight, bias = require_grad(*arguments_of((4, 5), dtype=dtype))
    with torch.autocast('cpu', torch.bfloat16):
        out = layer_norm(x, weight, bias)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert relative_error(out.double(), norm_loop(*as_double(x, weight, bias))) < TOLERANCES[torch.bfloat16]
    out.sum().backward()
    assert [tensor.grad.dtype for tensor in (x, weight, bias)] == [x.dtype, weight.dtype, bias.dtype]


def test_16_bits_are_normalized_in_float32():
    """Statistics of a large mean: in bfloat16 the deviation would be lost."""
    x = (100 + norm_arguments((3, 4), 64, torch.float64)[0]).bfloat16()
    for parameters in ((torch.ones(64), torch.zeros(64)), (None, None)):
        _, mean, inverse = OP(x, *parameters, 1e-5, torch.bfloat16)
        assert mean.dtype == inverse.dtype == torch.float32
        assert relative_error(mean.squeeze(-1), x.double().mean(-1)) < 1e-6
        assert relative_error(layer_norm(x, *parameters).double(), norm_loop(x.double(), None, None)) < 4e-2


class Ops(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('trained', [False, True])
def test_a_cpu_converts_16_bits_only_for_gradients_of_the_parameters(trained):
    x, weight, bias = arguments_of((3, 4), 64, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_(trained)
    with Ops() as ops:
        out = layer_norm(x, weight, bias)
    assert ('_to_copy' in ops.names) == trained
    assert relative_error(out.double(), norm_loop(*as_double(x, weight, bias))) < TOLERANCES[torch.bfloat16]


def test_gradients_of_the_parameters_are_added_in_float32():
    x, weight, bias = require_grad(*arguments_of((40, 50), dtype=torch.bfloat16))
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = torch.autograd.grad(layer_norm(x, weight, bias), (weight, bias), dout)
    doubles = require_grad(*as_double(x, weight, bias))
    expected = torch.autograd.grad(norm_loop(*doubles), doubles[1:], dout.double())
    for one, other in zip(gradients, expected, strict=True):
        assert relative_error(one.double(), other) < 1e-5  # in 16 bits 0.1


def test_layouts_of_the_inputs_do_not_matter():
    x, weight, bias = arguments_of((7, 13))
    expected = layer_norm(x, weight, bias)
    for same in (torch.cat((x, x), -1)[..., 5:], x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        assert torch.equal(layer_norm(same, weight, bias), expected)
    assert torch.equal(layer_norm(x.flatten(0, 2), weight, bias), expected.flatten(0, 2))
    assert torch.equal(layer_norm(x[:1].expand(2, -1, -1, -1), weight, bias)[1], expected[0])


def test_empty_batch():
    x, weight, bias = require_grad(*arguments_of((3, 4), batch=0))
    layer_norm(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_faults_are_noticed():
    x, weight, bias = arguments_of((7, 13))
    out, loosest = layer_norm(x, weight, bias), max(TOLERANCES.values())
    assert relative_error(layer_norm(x, None, bias), out) > loosest
    assert relative_error(layer_norm(x, weight, None), out) > loosest
    assert relative_error(x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias, out) > loosest


@pytest.mark.parametrize(('elementwise_affine', 'bias'), AFFINE)
def test_module_is_nn_layer_norm(elementwise_affine, bias):
    """Same values, gradients and state dict as `torch.nn.LayerNorm`; with its own weights in it."""
    options = {'eps': 1e-3, 'elementwise_affine': elementwise_affine, 'bias': bias}
    ours, theirs = LayerNorm(6, **options), nn.LayerNorm(6, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = require_grad(torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert torch.equal(ours(x), theirs(x))
    gradients = [torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())) for module in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_frozen_parameters_and_inputs_get_no_gradient():
    x, weight, bias = require_grad(*arguments_of((3, 4)))
    weight.requires_grad_(False)
    layer_norm(x, weight, bias).square().sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(F.layer_norm(x, (5,), weight, bias).square().sum(), (x, bias))
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(bias.grad, expected[1])


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'x': [1.0]}, TypeError, 'x must be a tensor, got list'),
        ({'x': torch.ones(5)}, ValueError, r'x must have at least two dimensions and one channel, got shape \(5,\)'),
        ({'x': torch.ones(5, 0)}, ValueError, r'x must have at least two dimensions and one channel'),
        ({'x': torch.ones(2, 5, dtype=torch.int64)}, TypeError, 'x must have one of the dtypes'),
        ({'weight': torch.ones(4)}, ValueError, r'weight must have shape \(5,\), got \(4,\)'),
        ({'bias': torch.ones(1, 5)}, ValueError, 'bias must have 1 dimensions'),
        ({'weight': torch.ones(5, device='meta')}, ValueError, 'weight must be on the device of the first argument'),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {'x': torch.ones(2, 3, 5), 'weight': torch.ones(5), 'bias': torch.ones(5), **change}
    with pytest.raises(error, match=f'layer_norm: .*{message}'):
        layer_norm(**arguments)
