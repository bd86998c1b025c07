"""`depthwise_conv` against a loop over the taps: values, gradients, layouts, faults and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mmspatialmamba.ops import depthwise_conv
from mmspatialmamba.ops.depthwise_conv import split_gradient
from mmspatialmamba.ops.depthwise_conv.reference import depthwise_conv_backward_reference, depthwise_conv_reference
from oracles import GRIDS, conv_arguments, relative_error, require_grad

# Ten times the largest relative error measured over GRIDS and OPTIONS, of the reference, whose kernels are rounded to
# the dtype: float32 1.6e-7, bfloat16 5.9e-3, float16 8.1e-4.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1.6e-6, torch.bfloat16: 5.9e-2, torch.float16: 8.1e-3}

OPTIONS = [
    {'stride': stride, 'activation': activation, 'relu_input': relu_input, 'residual': residual}
    for stride, activation, relu_input, residual in itertools.product(
        (1, 2), ('none', 'silu', 'relu'), (False, True), (False, True)
    )
    if stride == 1 or not residual
]


def conv_loop(x, weight, bias, stride, activation, relu_input, residual):
    """y[r, c] = sum over ky, kx of weight[ky, kx] x[stride r + ky - 1, stride c + kx - 1], and what stands around."""
    if relu_input:
        x = x.clamp(min=0)
    N, H, W, E = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    y = bias.expand(N, -(-H // stride), -(-W // stride), E).clone()
    for r, c, ky, kx in itertools.product(range(y.shape[1]), range(y.shape[2]), range(3), range(3)):
        y[:, r, c] += weight[:, 0, ky, kx] * padded[:, stride * r + ky, stride * c + kx]
    if activation == 'silu':
        y = y / (1 + torch.exp(-y))
    elif activation == 'relu':
        y = y.clamp(min=0)
    return y + x if residual else y


@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
def test_op_and_reference_equal_the_loop(options):
    for grid in GRIDS:
        expected = conv_loop(*conv_arguments(grid), **options)
        assert relative_error(depthwise_conv_reference(*conv_arguments(grid), **options), expected) < 1e-12
        for dtype, tolerance in TOLERANCES.items():
            arguments = conv_arguments(grid, dtype=dtype)
            y = depthwise_conv(*arguments, **options)
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert relative_error(y.double(), conv_loop(*(x.double() for x in arguments), **options)) < tolerance


@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
def test_gradients(options):
    for grid in ((1, 1), (3, 2), (4, 5)):
        arguments = require_grad(*conv_arguments(grid, channels=2, batch=1))
        assert torch.autograd.gradcheck(lambda *tensors: depthwise_conv(*tensors, **options), arguments)
        y = depthwise_conv_reference(*arguments, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        expected = torch.autograd.grad(y, arguments, dy)
        detached = [x.detach() for x in arguments]
        dx, dparameters = depthwise_conv_backward_reference(dy, *detached, **options)
        for one, other in zip((dx, *split_gradient(dparameters)), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('options', OPTIONS[::5], ids=lambda options: '-'.join(map(str, options.values())))
def test_opcheck(options):
    arguments = (*require_grad(*conv_arguments((4, 5))), *options.values())
    torch.library.opcheck(torch.ops.mmspatialmamba.depthwise_conv.default, arguments)


@pytest.mark.parametrize('stride', [1, 2])
def test_no_bias_is_a_bias_of_zero(stride):
    x, weight, bias = require_grad(*conv_arguments((4, 5)))
    options = {'stride': stride, 'activation': 'silu'}
    y, expected = depthwise_conv(x, weight, None, **options), depthwise_conv(x, weight, 0 * bias, **options)
    assert torch.equal(y, expected)
    for one, other in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        assert torch.equal(one, other)
    torch.library.opcheck(
        torch.ops.mmspatialmamba.depthwise_conv.default, (x, weight, None, stride, 'silu', False, False)
    )


def test_compiles_without_a_graph_break():
    arguments = require_grad(*conv_arguments((4, 5)))

    def call(*tensors):
        return depthwise_conv(*tensors, activation='silu')

    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(call(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_layouts_of_the_inputs_do_not_matter():
    x, weight, bias = conv_arguments((7, 13))
    expected = depthwise_conv(x, weight, bias)
    for same in (torch.cat((x, x), -1)[..., 5:], x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        assert torch.equal(depthwise_conv(same, weight, bias), expected)
    expanded = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(depthwise_conv(expanded, weight, bias), depthwise_conv(expanded.contiguous(), weight, bias))


def test_nan_stays_in_its_image_and_near_its_pixel():
    x, weight, bias = conv_arguments((7, 8))
    x[0, 3, 4, 2] = float('nan')
    for options in OPTIONS:
        found = depthwise_conv(x, weight, bias, **options).isnan()
        assert torch.equal(found, conv_loop(x, weight, bias, **options).isnan())
        assert found.any()
        assert not found[1].any()


def test_empty_batch():
    x, weight, bias = require_grad(*conv_arguments((3, 4), batch=0))
    depthwise_conv(x, weight, bias, stride=2).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_faults_are_noticed():
    x, weight, bias = conv_arguments((7, 13))
    y = depthwise_conv(x, weight, bias, activation='silu')
    loosest = max(TOLERANCES.values())
    replicated = F.conv2d(
        F.pad(x.permute(0, 3, 1, 2), [1] * 4, mode='replicate'), weight, bias, groups=5
    )  # instead of zeros
    assert relative_error(F.silu(replicated).permute(0, 2, 3, 1), y) > loosest
    assert relative_error(depthwise_conv(x, weight, torch.zeros_like(bias), activation='silu'), y) > loosest
    assert relative_error(depthwise_conv(x, weight.transpose(2, 3), bias, activation='silu'), y) > loosest


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'x': torch.ones(2, 3, 4)}, ValueError, r'x must have 4 dimensions, got shape \(2, 3, 4\)'),
        ({'x': torch.ones(2, 0, 4, 5)}, ValueError, 'at least one token and one channel'),
        ({'weight': torch.ones(5, 3, 3)}, ValueError, r'weight must have 4 dimensions'),
        ({'weight': torch.ones(4, 1, 3, 3)}, ValueError, r'weight must have shape \(5, 1, 3, 3\), got \(4, 1, 3, 3\)'),
        ({'bias': 1.0}, TypeError, 'bias must be a tensor, got float'),
        ({'stride': 3}, ValueError, 'stride must be 1 or 2, got 3'),
        ({'activation': 'gelu'}, ValueError, "activation must be one of none, silu, relu, got 'gelu'"),
        ({'stride': 2, 'residual': True}, ValueError, 'residual needs stride 1, got 2'),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {'x': torch.ones(2, 3, 4, 5), 'weight': torch.ones(5, 1, 3, 3), 'bias': torch.ones(5), **change}
    with pytest.raises(error, match=f'depthwise_conv: .*{message}'):
        depthwise_conv(**arguments)
