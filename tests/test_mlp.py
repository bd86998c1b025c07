"""`mlp` against its equation: values, gradients, what is kept, dtypes, layouts, faults and errors."""

import math

import pytest
import torch
from mmspatialmamba.ops import backends, mlp
from mmspatialmamba.ops.mlp.reference import mlp_backward_reference, mlp_reference
from oracles import layer_norm, mlp_arguments, require_grad, rms_error

OPS = torch.ops.mmspatialmamba
PART = 2048
"""Tokens that the C++ kernel takes at a time."""

# Of the result and of a gradient: at most ten times the largest relative root mean square error of a tensor measured
# over TOKENS and CHANNELS, which was 5.8e-16, 2.8e-7, 5.9e-3, 6.3e-4 and 2.9e-15, 1.2e-6, 9.7e-3, 1.4e-3, and always
# below 5e-2. In 16 bits norm, hidden values and products are rounded one after the other.
TOLERANCES = {
    torch.float64: (5.8e-15, 1.7e-14),
    torch.float32: (2.8e-6, 1.1e-5),
    torch.bfloat16: (4e-2, 4e-2),
    torch.float16: (6.3e-3, 1.4e-2),
}
TOKENS = (1, 2, 3, 53, PART - 1, PART, PART + 1, 3 * PART + 5)
CHANNELS = (8, 13, 40)
NAMES = ('out', 'dx', 'dnorm_weight', 'dnorm_bias', 'dweight1', 'dbias1', 'dweight2', 'dbias2')


def mlp_equation(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale=1, eps=1e-5):
    """LN(x) W1ᵀ + b1 = h, then x + scale (h (1 + erf(h / √2)) / 2 · W2ᵀ + b2)."""
    hidden = layer_norm(x, norm_weight, norm_bias, eps) @ weight1.T + bias1
    branch = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ weight2.T + bias2
    return x + torch.as_tensor(scale).view(-1, *[1] * (x.ndim - 1)) * branch


def gradients_of(out, arguments, dout):
    return torch.autograd.grad(out, arguments, dout.to(out.dtype))


def errors(arguments, scale=None):
    """Relative root mean square errors of the op's result and of each gradient, by name, against the equation."""
    exact = require_grad(*(x.double() for x in arguments))
    out = mlp(*arguments, scale)
    expected = mlp_equation(*exact, 1 if scale is None else scale.double())
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    actual = (out, *gradients_of(out, arguments, dout))
    wanted = (expected, *gradients_of(expected, exact, dout))
    return {name: rms_error(one, other) for name, one, other in zip(NAMES, actual, wanted, strict=True)}


def assert_below_tolerance(found, dtype):
    tolerance, of_gradients = TOLERANCES[dtype]
    wrong = {name: error for name, error in found.items() if error >= (tolerance if name == 'out' else of_gradients)}
    assert wrong == {}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('tokens', TOKENS)
def test_op_equals_the_equation(tokens, channels, dtype):
    arguments = require_grad(*mlp_arguments(tokens, channels, dtype))
    assert mlp(*arguments).dtype == dtype
    assert_below_tolerance(errors(arguments), dtype)


def test_a_gradient_scaled_by_105_percent_is_noticed():
    assert max(max(tolerances) for tolerances in TOLERANCES.values()) < 0.05


@pytest.mark.parametrize('shape', [(3, PART - 1, 13), (5, 7, 9, 13)])
def test_factor_of_each_image(shape):
    """Images of several parts and parts of several images, one of them dropped."""
    x, *others = mlp_arguments(math.prod(shape[:-1]), shape[-1])
    scale = torch.tensor([1.25, 0.0, 0.5, 2.0, 1.0][: shape[0]], dtype=x.dtype)
    assert_below_tolerance(errors(require_grad(x.view(shape), *others), scale), torch.float64)


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('tokens', [1, 53, 300])
def test_reference_equals_the_equation(tokens, dtype):
    arguments = require_grad(*mlp_arguments(tokens, 13, dtype))
    exact = require_grad(*(x.double() for x in arguments))
    scale = torch.tensor([1.25, 0.0, 0.5], dtype=dtype).repeat(tokens)[:tokens]
    expected = mlp_equation(*exact, scale.double())
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2 = (tensor.detach() for tensor in arguments)
    matrices = [tensor.to(dtype) for tensor in (weight1, bias1, weight2, bias2)]
    out, kept = mlp_reference(x, norm_weight, norm_bias, 1e-5, *matrices, scale, True)
    actual = mlp_backward_reference(dout, x, norm_weight, norm_bias, 1e-5, matrices[0], matrices[2], scale, kept, True)
    wanted = (expected, *gradients_of(expected, exact, dout))
    found = {name: rms_error(one, other) for name, one, other in zip(NAMES, (out, *actual), wanted, strict=True)}
    assert_below_tolerance(found, dtype)


@pytest.mark.parametrize('serve', ['op', 'reference'])
def test_without_parameters_the_gradient_of_the_input_is_the_same(serve):
    x, *parameters = mlp_arguments(53, 13)
    x.requires_grad_()
    dout = torch.randn_like(x)
    if serve == 'op':
        (dx,) = torch.autograd.grad(mlp(x, *parameters), x, dout)
    else:
        norm_weight, norm_bias, weight1, _, weight2, _ = parameters
        _, kept = mlp_reference(x.detach(), norm_weight, norm_bias, 1e-5, *parameters[2:], None, True)
        dx, *others = mlp_backward_reference(
            dout, x.detach(), norm_weight, norm_bias, 1e-5, weight1, weight2, None, kept, False
        )
        assert all(gradient.numel() == 0 for gradient in others)
    (expected,) = torch.autograd.grad(mlp_equation(x, *parameters), x, dout)
    assert_below_tolerance({'dx': rms_error(dx, expected)}, torch.float64)


def test_gradients():
    arguments = require_grad(*mlp_arguments(3, 5, hidden=7))
    scale = torch.tensor([1.0, 0.0, 1.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(mlp, (*arguments, scale))
    assert torch.autograd.gradcheck(mlp, arguments)


@pytest.mark.parametrize('keep', [True, False])
def test_opcheck(keep):
    x, norm_weight, norm_bias, *others = mlp_arguments(6)
    arguments = [x, norm_weight, norm_bias, 1e-5, *others]
    if keep:
        arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    arguments += [torch.ones(6, dtype=x.dtype) if keep else None, keep]
    torch.library.opcheck(OPS.mlp.default, arguments)


def test_compiles_without_a_graph_break():
    arguments = require_grad(*mlp_arguments(6))
    compiled = torch.compile(mlp, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(mlp(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_the_hidden_values():
    arguments = require_grad(*mlp_arguments(100, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mlp(*arguments)
    parameters = {x.data_ptr() for x in arguments[1:]}
    sizes = [x.numel() for x in kept if x.data_ptr() not in parameters]
    again = backends()['cpu'].implementation == 'cpp'
    expected = [100 * 8, 100 * 32] if again else [100, 100, 100 * 8, 100 * 8, 100 * 32, 100 * 32]
    assert sorted(sizes) == expected
    x, norm_weight, norm_bias, *others = (x.detach() for x in arguments)
    assert OPS.mlp(x, norm_weight, norm_bias, 1e-5, *others, None, False)[1] == []


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
    expected = mlp_equation(*(t.double() for t in (x, *others)))
    assert rms_error(out, expected) < TOLERANCES[torch.bfloat16][0]
    with torch.autocast('cpu', torch.bfloat16):
        assert mlp(*(t.double() for t in (x, *others))).dtype == torch.float64


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-15), (torch.float32, 5e-7)], ids=str)
@pytest.mark.parametrize('bias', [-1e4, -30.0, -13.0, -5.0, 0.0, 5.0, 30.0, 1e4])
def test_activation_from_far_below_to_far_above(bias, dtype, tolerance):
    """One hidden value, which is its bias; the gradient of the bias is the slope of GELU there."""
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


FAULTS = {
    'norm without its shift': lambda x, *others: mlp_equation(x, others[0], 0 * others[1], *others[2:]),
    'first bias dropped': lambda *t: mlp_equation(*t[:4], 0 * t[4], *t[5:]),
    'second bias dropped': lambda *t: mlp_equation(*t[:6], 0 * t[6]),
    'another eps': lambda *t: mlp_equation(*t, eps=0.1),
    'no skip connection': lambda x, *others: mlp_equation(x, *others) - x,
    'tanh in place of erf': lambda *t: t[0] + torch.nn.functional.gelu(
        layer_norm(*t[:3]) @ t[3].T + t[4], approximate='tanh') @ t[5].T + t[6],
}  # fmt: skip
EXACT_ONLY = ('tanh in place of erf',)
"""Faults below what 16 bits resolve."""


@pytest.mark.parametrize(
    ('fault', 'dtype'),
    [(fault, dtype) for fault in FAULTS for dtype in TOLERANCES if dtype.itemsize > 2 or fault not in EXACT_ONLY],
    ids=str,
)
def test_faults_are_noticed(fault, dtype):
    arguments = mlp_arguments(53, 8)
    assert rms_error(FAULTS[fault](*arguments), mlp_equation(*arguments)) > TOLERANCES[dtype][0]


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
