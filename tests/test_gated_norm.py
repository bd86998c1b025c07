"""`gated_norm` against its equation: values, gradients, layouts, faults and errors."""

import pytest
import torch
from mmspatialmamba.ops import gated_norm
from mmspatialmamba.ops.gated_norm.reference import gated_norm_backward_reference, gated_norm_reference
from oracles import GRIDS, layer_norm, norm_arguments, relative_error, require_grad

# Ten times the largest relative error measured over GRIDS and CHANNELS: float32 2.2e-7, bfloat16 3.9e-3, float16
# 4.6e-4 (the last two are the rounding of the output).
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2.2e-6, torch.bfloat16: 3.9e-2, torch.float16: 4.6e-3}
CHANNELS = (1, 5, 40)


def norm_equation(y, z, weight, bias, eps=1e-5):
    """(y - mean) / sqrt(variance + eps) · weight + bias, times z / (1 + exp(-z))."""
    return layer_norm(y, weight, bias, eps) * z / (1 + torch.exp(-z))


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('grid', GRIDS)
def test_op_and_reference_equal_the_equation(grid, channels):
    arguments = norm_arguments(grid, channels)
    assert relative_error(gated_norm_reference(*arguments, 1e-5), norm_equation(*arguments)) < 1e-12
    for dtype, tolerance in TOLERANCES.items():
        arguments = norm_arguments(grid, channels, dtype)
        out = gated_norm(*arguments)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert relative_error(out.double(), norm_equation(*(x.double() for x in arguments))) < tolerance


@pytest.mark.parametrize('channels', [2, 5, 17])
def test_gradients(channels):
    arguments = require_grad(*norm_arguments((2, 3), channels, batch=1))
    assert torch.autograd.gradcheck(gated_norm, arguments)
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.autograd.grad(norm_equation(*arguments), arguments, dout)
    detached = [x.detach() for x in arguments]
    expected = (*expected, norm_equation(*detached))
    dy, dz, dparameters, out = gated_norm_backward_reference(dout, *detached, 1e-5, True)
    for one, other in zip((dy, dz, *dparameters, out), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_opcheck():
    arguments = (*require_grad(*norm_arguments((4, 5))), 1e-5)
    torch.library.opcheck(torch.ops.mmspatialmamba.gated_norm.default, arguments)


def test_compiles_without_a_graph_break():
    arguments = require_grad(*norm_arguments((4, 5)))
    compiled = torch.compile(gated_norm, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(gated_norm(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_layouts_of_the_inputs_do_not_matter():
    y, z, weight, bias = norm_arguments((7, 13))
    expected = gated_norm(y, z, weight, bias)
    halves = torch.cat((y, z), -1).chunk(2, -1)
    assert torch.equal(gated_norm(*halves, weight, bias), expected)
    permuted = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in (y, z)]
    assert torch.equal(gated_norm(*permuted, weight, bias), expected)
    expanded = z[:1].expand(2, -1, -1, -1)
    assert torch.equal(gated_norm(y, expanded, weight, bias), gated_norm(y, expanded.contiguous(), weight, bias))


def test_a_large_mean_does_not_cancel():
    y, z, weight, bias = norm_arguments((7, 13), 40, torch.float32)
    y = y + 1e3
    expected = norm_equation(*(x.double() for x in (y, z, weight, bias)))
    # The mean's own rounding, 1e3 times 2^-24, is relative to a deviation of 3.
    assert relative_error(gated_norm(y, z, weight, bias).double(), expected) < 1e-4


def test_nan_stays_in_its_token():
    y, z, weight, bias = norm_arguments((4, 5))
    for position in (0, 1):
        broken = [y.clone(), z.clone()]
        broken[position][0, 1, 2, 3] = float('nan')
        found = gated_norm(*broken, weight, bias).isnan()
        assert torch.equal(found, norm_equation(*broken, weight, bias).isnan())
        assert found.any()


def test_empty_batch():
    arguments = require_grad(*norm_arguments((3, 4), batch=0))
    gated_norm(*arguments).sum().backward()
    for x in arguments:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def test_faults_are_noticed():
    y, z, weight, bias = norm_arguments((7, 13))
    out, loosest = gated_norm(y, z, weight, bias), max(TOLERANCES.values())
    assert relative_error(norm_equation(y, z, weight, 0 * bias), out) > loosest
    assert relative_error(norm_equation(y, z, weight, bias, eps=1.0), out) > loosest
    assert relative_error(norm_equation(y, -z, weight, bias), out) > loosest


@pytest.mark.parametrize(
    ('position', 'value', 'error', 'message'),
    [
        (0, torch.ones(2, 3, 5), ValueError, 'y must have 4 dimensions'),
        (1, torch.ones(2, 3, 4, 6), ValueError, r'z must have shape \(2, 3, 4, 5\), got \(2, 3, 4, 6\)'),
        (1, torch.ones(2, 3, 4, 5).double(), TypeError, 'z must have the dtype of the first argument, torch.float32'),
        (2, torch.ones(4), ValueError, r'weight must have shape \(5,\), got \(4,\)'),
        (3, None, TypeError, 'bias must be a tensor, got NoneType'),
    ],
)
def test_bad_arguments(position, value, error, message):
    arguments = [torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5), torch.ones(5), torch.ones(5)]
    arguments[position] = value
    with pytest.raises(error, match=f'gated_norm: .*{message}'):
        gated_norm(*arguments)
