"""`gelu` against its equation: values, gradients, dtypes, layouts, faults, errors, and where it is PyTorch's own."""

import math

import pytest
import torch
import torch.nn as nn
from mmspatialmamba.ops import gelu
from oracles import relative_error, rms_error

from mmspatialmamba.models.layers import GELU

# Ten times the largest relative root-mean-square error measured, of result and gradient, which was 1.2e-16, 9.1e-8,
# 2.2e-3 and 3.1e-4.
TOLERANCES = {torch.float64: 1.2e-15, torch.float32: 9.1e-7, torch.bfloat16: 2.2e-2, torch.float16: 3.1e-3}
SHAPES = ((), (0, 3), (1,), (15,), (16,), (2, 3, 5, 7), (3, 2**15), (2, 2**15 + 17))
"""From no value to several tasks of the C++ kernel, of 2**15 values, and no whole number of vectors."""


def gelu_equation(x):
    """x (1 + erf(x / √2)) / 2."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def values(shape, dtype, factor=3):
    return (factor * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def result_and_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_op_equals_the_equation(shape, dtype):
    x = values(shape, dtype)
    for actual, expected in zip(
        result_and_gradient(gelu, x), result_and_gradient(gelu_equation, x.double()), strict=True
    ):
        assert actual.dtype == dtype
        assert actual.shape == shape
        assert x.numel() == 0 or rms_error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_layouts_give_the_same_bits(dtype):
    x = values((4, 6, 10), dtype)
    for layout in (x.transpose(0, 2), x[:, ::2], x[..., 3:], x[:1].expand(4, 6, 10)):
        dense = layout.contiguous()
        for one, other in zip(result_and_gradient(gelu, layout), result_and_gradient(gelu, dense), strict=True):
            assert torch.equal(one, other)
        assert gelu(layout).is_contiguous()


def test_large_values():
    """Far from 0 the op is x or 0, and its gradient 1 or 0; what is not finite is so as in PyTorch's."""
    x = torch.tensor([-math.inf, -1e30, -40.0, -14.0, 14.0, 40.0, 1e30, math.inf, math.nan])
    y, dx = result_and_gradient(gelu, x)
    expected, dexpected = result_and_gradient(torch.nn.functional.gelu, x)
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[1:-2], expected[1:-2], rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(dx[1:-2], dexpected[1:-2], rtol=1e-6, atol=1e-30)
    assert y[-1].isnan()
    assert dx[-1].isnan()


def test_gradcheck_and_opcheck():
    x = values((3, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gelu, x)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.mmspatialmamba.gelu.default, (values((3, 5), dtype).requires_grad_(),))


def test_the_approximation_is_noticed():
    x = values((1000,), torch.float64)
    approximate = torch.nn.functional.gelu(x, approximate='tanh')
    assert rms_error(approximate, gelu(x)) > 100 * TOLERANCES[torch.float32]


def test_errors():
    with pytest.raises(TypeError, match='gelu: x must have one of the dtypes'):
        gelu(torch.arange(3))
    x = values((3,), torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='double backward'):
        torch.autograd.grad(dx.sum(), x)


def test_module():
    """It is a `GELU` of PyTorch, whose approximation may be set."""
    x, module = values((3, 5), torch.float32), GELU()
    assert isinstance(module, nn.GELU)
    assert torch.equal(module(x), gelu(x))
    module.approximate = 'tanh'
    assert torch.equal(module(x), nn.GELU('tanh')(x))
    assert relative_error(module(x), gelu(x)) > 1e-5


def test_on_a_gpu_it_is_the_standard_one():
    """Traced for a GPU, which need not be there, the op is PyTorch's own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x = torch.empty(3, 5, device='cuda')
        graph = make_fx(gelu)(x)
    assert [node.target for node in graph.graph.nodes if node.op == 'call_function'] == [torch.ops.aten.gelu.default]
