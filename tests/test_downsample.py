"""`downsample` against its equation: values, gradients, parts, what is kept, dtypes and errors."""

import pytest
import torch
import torch.nn.functional as F
from mmspatialmamba.ops import downsample
from mmspatialmamba.ops.downsample import reference
from oracles import GRIDS, downsample_arguments, require_grad, rms_error

OPS = torch.ops.mmspatialmamba
CHANNELS, HIDDEN = 12, 40
"""Of `downsample_arguments`."""

# Of the result and of a gradient: at most ten times the largest relative root mean square error measured over GRIDS, in
# one part and in many, and below 5e-2: 2.2e-16, 7.6e-8, 1.5e-3, 1.9e-4 and 4.3e-16, 4.1e-7, 6.2e-3, 7.3e-4.
TOLERANCES = {
    torch.float64: (2.2e-15, 4.3e-15),
    torch.float32: (7.6e-7, 4.1e-6),
    torch.bfloat16: (1.5e-2, 4.9e-2),
    torch.float16: (1.9e-3, 7.3e-3),
}
NAMES = ('out', 'dx', 'dweight', 'dbias', 'dconv_weight', 'dconv_bias')


def equation(x, weight, bias, conv_weight, conv_bias):
    hidden = F.relu(x @ weight.T + bias).permute(0, 3, 1, 2)
    out = F.conv2d(hidden, conv_weight, conv_bias, stride=2, padding=1, groups=len(weight))
    return F.relu(out).permute(0, 2, 3, 1)


def errors(arguments):
    """Relative root mean square errors of the op's result and of each gradient, by name, against the equation."""
    exact = require_grad(*(x.double() for x in arguments))
    out, expected = downsample(*arguments), equation(*exact)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    actual = (out, *torch.autograd.grad(out, arguments, dout))
    wanted = (expected, *torch.autograd.grad(expected, exact, dout.double()))
    return {name: rms_error(one, other) for name, one, other in zip(NAMES, actual, wanted, strict=True)}


@pytest.fixture(params=[1, 3, 32], ids=lambda width: f'parts of {width}')
def in_parts(monkeypatch, request):
    """Parts of so many hidden channels; the last of three is one channel."""
    monkeypatch.setattr(reference, 'VALUES_AT_ONCE', 0)
    monkeypatch.setattr(reference, 'FEWEST_CHANNELS', request.param)


def assert_below_tolerance(found, dtype):
    of_result, of_gradient = TOLERANCES[dtype]
    wrong = {name: error for name, error in found.items() if error >= (of_result if name == 'out' else of_gradient)}
    assert wrong == {}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_op_equals_the_equation(grid, dtype):
    assert_below_tolerance(errors(require_grad(*downsample_arguments(grid, dtype=dtype))), dtype)


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_parts_of_the_channels_equal_the_equation(in_parts, dtype):
    assert_below_tolerance(errors(require_grad(*downsample_arguments((19, 23), dtype=dtype))), dtype)


FAULTS = {
    'a part twice': ('_parts', lambda x, channels: [slice(0, 32), slice(32, channels), slice(32, channels)]),
    'no first ReLU': ('CONV_OPTIONS', (2, 'relu', False, False)),
    'no second ReLU': ('CONV_OPTIONS', (2, 'none', True, False)),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_noticed(monkeypatch, fault):
    monkeypatch.setattr(reference, *FAULTS[fault])
    found = errors(require_grad(*downsample_arguments((7, 13))))
    of_result, of_gradient = TOLERANCES[torch.float64]
    assert found.pop('out') > of_result or max(found.values()) > of_gradient


def test_backward_keeps_the_input_alone():
    arguments = require_grad(*downsample_arguments((7, 13)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        downsample(*arguments)
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in arguments)


def test_another_device_keeps_the_hidden_map():
    arguments = [x.to('meta').requires_grad_() for x in downsample_arguments((7, 13))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = downsample(*arguments)
    assert [tuple(x.shape) for x in kept if x.ndim == 4 and x.shape[-1] == HIDDEN] == [(2, 7, 13, HIDDEN)]
    for gradient, argument in zip(torch.autograd.grad(out.sum(), arguments), arguments, strict=True):
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)


def test_gradient_of_the_input_alone():
    x, *parameters = downsample_arguments((7, 13))
    x.requires_grad_()
    dout = torch.randn(2, 4, 7, HIDDEN, dtype=torch.float64)
    (dx,) = torch.autograd.grad(downsample(x, *parameters), x, dout)
    (expected,) = torch.autograd.grad(equation(x, *parameters), x, dout)
    assert rms_error(dx, expected) < TOLERANCES[torch.float64][1]


@pytest.mark.parametrize('keep', [False, True])
def test_opcheck(keep):
    arguments = downsample_arguments((4, 5))
    if keep:
        arguments = require_grad(*arguments)
    torch.library.opcheck(OPS.downsample.default, (*arguments, keep))


def test_compiles_without_a_graph_break():
    arguments = require_grad(*downsample_arguments((4, 5)))
    compiled = torch.compile(downsample, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(downsample(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_same_bits_in_every_run(in_parts):
    arguments = require_grad(*downsample_arguments((19, 23), dtype=torch.float32))
    runs = []
    for _ in range(3):
        out = downsample(*arguments)
        runs.append((out, *torch.autograd.grad(out, arguments, torch.ones_like(out))))
    for outputs in zip(*runs, strict=True):
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_layouts_of_the_input_do_not_matter():
    x, *others = downsample_arguments((7, 13))
    expected = downsample(x, *others)
    assert expected.is_contiguous()
    for layout in (x.movedim(-1, 0).contiguous().movedim(0, -1), torch.cat((x, x), -1)[..., :CHANNELS]):
        assert rms_error(downsample(layout, *others), expected) < 1e-15
        leaf = layout.requires_grad_()
        (dx,) = torch.autograd.grad(downsample(leaf, *others).sum(), leaf)
        assert dx.shape == x.shape


def test_autocast_rounds_to_its_dtype():
    arguments = require_grad(*downsample_arguments((19, 23), dtype=torch.float32))
    with torch.autocast('cpu', torch.bfloat16):
        out = downsample(*arguments)
    assert out.dtype == torch.bfloat16
    assert rms_error(out, equation(*(x.double() for x in arguments))) < TOLERANCES[torch.bfloat16][0]
    for gradient in torch.autograd.grad(out.sum(), arguments):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_empty_batch():
    arguments = require_grad(*downsample_arguments((3, 4), batch=0))
    out = downsample(*arguments)
    assert out.shape == (0, 2, 2, HIDDEN)
    dx, *gradients = torch.autograd.grad(out.sum(), arguments)
    assert dx.shape == (0, 3, 4, CHANNELS)
    assert all((gradient == 0).all() for gradient in gradients)


WRONG = {
    'x of three dimensions': (0, lambda x: x[0], ValueError, 'x must have 4 dimensions'),
    'x of integers': (0, lambda x: x.long(), TypeError, 'x must have one of the dtypes'),
    'a weight of other channels': (1, lambda x: x[:, 1:], ValueError, r'weight must have shape \(40, 12\)'),
    'a shorter bias': (2, lambda x: x[1:], ValueError, r'bias must have shape \(40,\)'),
    'larger kernels': (3, lambda x: x.repeat(1, 1, 2, 1), ValueError, r'conv_weight must have shape \(40, 1, 3, 3\)'),
    'no convolution bias': (4, lambda x: None, TypeError, 'conv_bias must be a tensor'),
}


@pytest.mark.parametrize('fault', WRONG)
def test_wrong_arguments_are_named(fault):
    position, change, error, message = WRONG[fault]
    arguments = downsample_arguments((4, 5))
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=f'downsample: {message}'):
        downsample(*arguments)


def test_no_double_backward():
    arguments = require_grad(*downsample_arguments((4, 5)))
    (dx,) = torch.autograd.grad(downsample(*arguments).sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match='double backward'):
        dx.sum().backward()
