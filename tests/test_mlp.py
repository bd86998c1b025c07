"""`mlp` against its equation: values, gradients, what is kept, dtypes, layouts, faults and errors."""

import math

import pytest
import torch
from mmspatialmamba.ops import mlp
from mmspatialmamba.ops.mlp.reference import mlp_backward_reference, mlp_reference
from oracles import layer_norm, mlp_arguments, relative_error, require_grad

OPS = torch.ops.mmspatialmamba
PART = 2048
"""Tokens that the C++ kernel takes at a time."""

# Ten times the largest relative error measured over TOKENS and CHANNELS: forward 6.5e-16, 6.2e-7, 9.3e-3, 9.9e-4;
# backward 1.7e-15, 1.1e-6, 1.2e-2, 1.8e-3. In 16 bits norm, hidden values and products are rounded one after the other.
TOLERANCES = {torch.float64: 1.7e-14, torch.float32: 1.1e-5, torch.bfloat16: 1.2e-1, torch.float16: 1.8e-2}
TOKENS = (1, 2, 3, 53, PART - 1, PART, PART + 1, 3 * PART + 5)
CHANNELS = (8, 13, 40)


def mlp_equation(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale=1, eps=1e-5):
    """LN(x) W1ᵀ + b1 = h, then x + scale (h (1 + erf(h / √2)) / 2 · W2ᵀ + b2)."""
    hidden = layer_norm(x, norm_weight, norm_bias, eps) @ weight1.T + bias1
    branch = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ weight2.T + bias2
    return x + torch.as_tensor(scale).view(-1, *[1] * (x.ndim - 1)) * branch


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('tokens', TOKENS)
def test_op_equals_the_equation(tokens, channels):
    for dtype, tolerance in TOLERANCES.items():
        arguments = require_grad(*mlp_arguments(tokens, channels, dtype))
        exact = require_grad(*(x.double() for x in arguments))
        out, expected = mlp(*arguments), mlp_equation(*exact)
        assert out.dtype == dtype
        assert relative_error(out.double(), expected) < tolerance
        dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        gradients = torch.autograd.grad(out, arguments, dout)
        for one, other in zip(gradients, torch.autograd.grad(expected, exact, dout.double()), strict=True):
            assert relative_error(one.double(), other) < tolerance, dtype


def test_factor_of_each_image():
    """Images of several parts and parts of several images, one of them dropped."""
    for shape in ((3, PART - 1, 13), (5, 7, 9, 13)):
        x, *others = mlp_arguments(math.prod(shape[:-1]), shape[-1])
        arguments = require_grad(x.view(shape), *others)
        scale = torch.tensor([1.25, 0.0, 0.5, 2.0, 1.0][: shape[0]], dtype=x.dtype)
        out, expected = mlp(*arguments, scale), mlp_equation(*arguments, scale)
        assert relative_error(out, expected) < TOLERANCES[torch.float64]
        dout = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        gradients = torch.autograd.grad(out, arguments, dout)
        for one, other in zip(gradients, torch.autograd.grad(expected, arguments, dout), strict=True):
            assert relative_error(one, other) < TOLERANCES[torch.float64]


def test_gradients():
    arguments = require_grad(*mlp_arguments(3, 5, hidden=7))
    scale = torch.tensor([1.0, 0.0, 1.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(mlp, (*arguments, scale))
    assert torch.autograd.gradcheck(mlp, arguments)
    dout = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.autograd.grad(mlp_equation(*arguments, scale), arguments, dout)
    x, norm_weight, norm_bias, *others = (tensor.detach() for tensor in arguments)
    out, hidden = mlp_reference(x, norm_weight, norm_bias, 1e-5, *others, scale, True)
    assert relative_error(out, mlp_equation(*arguments, scale)) < 1e-14
    gradients = mlp_backward_reference(dout, x, norm_weight, norm_bias, 1e-5, *others[:-1], scale, hidden)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('keep_hidden', [True, False])
def test_opcheck(keep_hidden):
    x, norm_weight, norm_bias, *others = mlp_arguments(6)
    arguments = [x, norm_weight, norm_bias, 1e-5, *others]
    if keep_hidden:
        arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    arguments += [torch.ones(6, dtype=x.dtype) if keep_hidden else None, keep_hidden]
    torch.library.opcheck(OPS.mlp.default, arguments)


def test_compiles_without_a_graph_break():
    arguments = require_grad(*mlp_arguments(6))
    compiled = torch.compile(mlp, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(mlp(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_the_hidden_values_once():
    arguments = require_grad(*mlp_arguments(100, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mlp(*arguments)
    parameters = {x.data_ptr() for x in arguments[1:]}
    sizes = [x.numel() for x in kept if x.data_ptr() not in parameters]
    assert sorted(sizes) == [100 * 8, 100 * 32]
    x, norm_weight, norm_bias, *others = (x.detach() for x in arguments)
    assert OPS.mlp(x, norm_weight, norm_bias, 1e-5, *others, None, False)[1].numel() == 0


def test_same_bits_in_every_run():
    arguments = require_grad(*mlp_arguments(2 * PART + 5, 40, torch.float32))
    runs = []
    for _ in range(3):
        out = mlp(*arguments)
        runs.append((out, *torch.autograd.grad(out, arguments, torch.ones_like(out))))
    for outputs in zip(*runs, strict=True):
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_layouts_of_the_input_do_not_matter():
    x, *others = mlp_arguments(24)
    expected = mlp(x, *others)
    assert torch.equal(mlp(x.view(2, 3, 4, 5), *others), expected.view(2, 3, 4, 5))
    assert torch.equal(mlp(x.T.contiguous().T, *others), expected)
    assert torch.equal(mlp(torch.cat((x, x), -1)[:, :5], *others), expected)
    transposed = [w.T.contiguous().T if w.ndim == 2 else w for w in others]
    torch.testing.assert_close(mlp(x, *transposed), expected, rtol=1e-14, atol=1e-14)


def test_autocast_rounds_to_its_dtype():
    x, *others = require_grad(*mlp_arguments(50, 8, torch.float32))
    with torch.autocast('cpu', torch.bfloat16):
        out = mlp(x, *others)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out.sum(), (x, *others))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert relative_error(out.double(), mlp_equation(*(t.double() for t in (x, *others)))) < TOLERANCES[torch.bfloat16]
    with torch.autocast('cpu', torch.bfloat16):
        assert mlp(*(t.double() for t in (x, *others))).dtype == torch.float64


@pytest.mark.parametrize('bias', [-1e4, -30.0, -13.0, -5.0, 0.0, 5.0, 30.0, 1e4])
def test_activation_from_far_below_to_far_above(bias):
    """One hidden value, which is its bias; the gradient of the bias is the slope of GELU there."""
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
        one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        value = torch.full((1,), bias, dtype=dtype, requires_grad=True)
        out = mlp(zero.view(1, 1), one, zero, zero.view(1, 1), value, one.view(1, 1), zero)
        exact = torch.full((1,), bias, dtype=torch.float64, requires_grad=True)
        expected = torch.nn.functional.gelu(exact)
        scale = max(abs(bias), 1)
        assert abs(out.item() - expected.item()) < tolerance * scale
        slopes = [torch.autograd.grad(y.sum(), x)[0].item() for y, x in ((out, value), (expected, exact))]
        assert abs(slopes[0] - slopes[1]) < tolerance * 10


def test_no_tokens():
    arguments = require_grad(*mlp_arguments(0))
    mlp(*arguments, torch.ones(0)).sum().backward()
    for x in arguments:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def test_faults_are_noticed():
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2 = arguments = mlp_arguments(53, 8)
    out, loosest = mlp(*arguments), max(TOLERANCES.values())
    for fault in (
        (x, norm_weight, 0 * norm_bias, weight1, bias1, weight2, bias2),
        (x, norm_weight, norm_bias, weight1, 0 * bias1, weight2, bias2),
        (x, norm_weight, norm_bias, weight1, bias1, weight2, 0 * bias2),
    ):
        assert relative_error(mlp_equation(*fault), out) > loosest
    assert relative_error(mlp_equation(*arguments, eps=10.0), out) > loosest
    assert relative_error(mlp_equation(*arguments) - x, out) > loosest


@pytest.mark.parametrize(
    ('position', 'value', 'error', 'message'),
    [
        (0, torch.ones(()), ValueError, 'x must have at least two dimensions and one channel'),
        (0, torch.ones(6, 5).int(), TypeError, 'x must have one of the dtypes'),
        (1, torch.ones(4), ValueError, r'norm_weight must have shape \(5,\), got \(4,\)'),
        (3, torch.ones(5), ValueError, 'weight1 must have 2 dimensions'),
        (4, torch.ones(5), ValueError, r'bias1 must have shape \(20,\), got \(5,\)'),
        (5, torch.ones(20, 5), ValueError, r'weight2 must have shape \(5, 20\), got \(20, 5\)'),
        (6, None, TypeError, 'bias2 must be a tensor, got NoneType'),
        (7, torch.ones(6, 1), ValueError, 'scale must have 1 dimensions'),
        (7, torch.ones(5), ValueError, r'scale must have shape \(6,\), got \(5,\)'),
        (7, torch.ones(6, requires_grad=True), ValueError, 'scale must not require a gradient'),
    ],
)
def test_bad_arguments(position, value, error, message):
    arguments = [*mlp_arguments(6), None]
    arguments[position] = value
    with pytest.raises(error, match=f'mlp: .*{message}'):
        mlp(*arguments)
