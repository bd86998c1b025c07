"""`ssm_layer` against its equation: values, gradients, what is kept, dtypes and errors."""

import pytest
import torch
import torch.nn.functional as F
from mmspatialmamba.ops import ssm_layer
from mmspatialmamba.ops.ssm_layer import reference
from mmspatialmamba.ops.state_fusion.taps import TAP_OFFSETS
from oracles import GRIDS, layer_arguments, layer_norm, require_grad, rms_error, scan_loop

OPS = torch.ops.mmspatialmamba

# Of the result and of a gradient: at most ten times the largest relative root mean square error of a tensor measured
# with eight channels, which was 5.2e-16, 2.2e-7, 4.2e-3, 6e-4 and 8.0e-15, 5.2e-6, 2.0e-2, 4.7e-3, and always below
# 5e-2. In 16 bits the maps between the parts are rounded one after the other.
TOLERANCES = {
    torch.float64: (5.2e-15, 6.3e-14),
    torch.float32: (2.2e-6, 5.2e-5),
    torch.bfloat16: (4.2e-2, 4.8e-2),
    torch.float16: (6e-3, 4.5e-2),
}
LARGE_GRIDS = ((40, 30), (31, 17))
"""For 16 bits: gradients of parameters are sums over tokens, whose roundings average out where there are many."""

NAMES = (
    'out', 'dx', 'dnorm_weight', 'dnorm_bias', 'din_weight', 'dconv_weight', 'dconv_bias', 'dx_weight', 'ddt_weight',
    'ddt_bias', 'dA', 'dD', 'dtaps', 'dout_norm_weight', 'dout_norm_bias', 'dout_weight',
)  # fmt: skip


def fusion_equation(h, taps):
    """The sum of the taps times the map shifted by their offsets, replicate padding."""
    rows, columns = (torch.arange(size) for size in h.shape[1:3])
    total = 0
    for (y, x), tap in zip(TAP_OFFSETS, taps, strict=True):
        shifted = h[:, (rows + y).clamp(0, len(rows) - 1)][:, :, (columns + x).clamp(0, len(columns) - 1)]
        total = total + tap * shifted
    return total


def layer_equation(
    x, norm_weight, norm_bias, in_weight, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, taps,
    out_norm_weight, out_norm_bias, out_weight, scale=1, eps=1e-5, out_eps=1e-5,
):  # fmt: skip
    """Norm, projection, convolution with SiLU, the loop over tokens, fusion, gated norm, projection, sum."""
    u, z = (layer_norm(x, norm_weight, norm_bias, eps) @ in_weight.T).chunk(2, -1)
    u = F.conv2d(u.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1, groups=len(conv_weight))
    u = u.permute(0, 2, 3, 1)
    u = u / (1 + torch.exp(-u))
    dt, B, C = (u @ x_weight.T).split((dt_weight.shape[1], 1, 1), -1)
    delta = torch.log1p(torch.exp(dt @ dt_weight.T + dt_bias))
    h = scan_loop(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2)).unflatten(1, x.shape[1:3])
    y = fusion_equation(h, taps) * C + D * u
    branch = layer_norm(y, out_norm_weight, out_norm_bias, out_eps) * z / (1 + torch.exp(-z)) @ out_weight.T
    return x + torch.as_tensor(scale).view(-1, 1, 1, 1) * branch


def errors(arguments, scale=None):
    """Relative root mean square errors of the op's result and of each gradient, by name, against the equation."""
    exact = require_grad(*(x.double() for x in arguments))
    out = ssm_layer(*arguments, scale)
    expected = layer_equation(*exact, 1 if scale is None else scale.double())
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    actual = (out, *torch.autograd.grad(out, arguments, dout))
    wanted = (expected, *torch.autograd.grad(expected, exact, dout.double()))
    return {name: rms_error(one, other) for name, one, other in zip(NAMES, actual, wanted, strict=True)}


def assert_below_tolerance(found, dtype):
    tolerance, of_gradients = TOLERANCES[dtype]
    wrong = {name: error for name, error in found.items() if error >= (tolerance if name == 'out' else of_gradients)}
    assert wrong == {}


@pytest.mark.parametrize(
    ('grid', 'dtype'),
    [(grid, dtype) for dtype in TOLERANCES for grid in (GRIDS if dtype.itemsize > 2 else LARGE_GRIDS)],
    ids=str,
)
def test_op_equals_the_equation(grid, dtype):
    arguments = require_grad(*layer_arguments(grid, 8, dtype=dtype))
    out = ssm_layer(*arguments)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_below_tolerance(errors(arguments), dtype)


def test_a_gradient_scaled_by_105_percent_is_noticed():
    assert max(max(tolerances) for tolerances in TOLERANCES.values()) < 0.05


def test_factor_of_each_image():
    arguments = require_grad(*layer_arguments((7, 13), 8, batch=3))
    assert_below_tolerance(errors(arguments, torch.tensor([1.25, 0.0, 0.5], dtype=torch.float64)), torch.float64)


@pytest.mark.parametrize('tokens', [1, 2 * 13 * 3, 2 * 13 * 6])
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_inference_by_parts_of_rows_equals_the_equation(monkeypatch, dtype, tokens):
    """Parts of one row, of three with one left over, and of six."""
    monkeypatch.setattr(reference, 'TOKENS_AT_ONCE', tokens)
    arguments = layer_arguments((7, 13), 8, dtype=dtype)
    for scale in (None, torch.tensor([1.25, 0.5])):
        out = ssm_layer(*arguments, scale)
        expected = layer_equation(*(x.double() for x in arguments), 1 if scale is None else scale.double())
        assert (out.dtype, out.is_contiguous()) == (dtype, True)
        assert rms_error(out, expected) < TOLERANCES[dtype][0]


def test_inference_by_parts_under_autocast(monkeypatch):
    monkeypatch.setattr(reference, 'TOKENS_AT_ONCE', 2 * 13 * 3)
    arguments = layer_arguments((7, 13), 8, dtype=torch.float32)
    for scale in (None, torch.tensor([1.25, 0.5])):
        with torch.autocast('cpu', torch.bfloat16):
            out = ssm_layer(*arguments, scale)
        expected = layer_equation(*(x.double() for x in arguments), 1 if scale is None else scale.double())
        assert out.dtype == torch.float32
        assert rms_error(out, expected) < TOLERANCES[torch.bfloat16][0]


def test_without_parameters_the_gradient_of_the_input_is_the_same():
    x, *parameters = layer_arguments((7, 13), 8)
    x.requires_grad_()
    dout = torch.randn_like(x)
    (dx,) = torch.autograd.grad(ssm_layer(x, *parameters), x, dout)
    (expected,) = torch.autograd.grad(layer_equation(x, *parameters), x, dout)
    assert_below_tolerance({'dx': rms_error(dx, expected)}, torch.float64)


def test_gradients():
    arguments = require_grad(*layer_arguments((2, 3), 3, batch=1))
    assert torch.autograd.gradcheck(ssm_layer, arguments)


@pytest.mark.parametrize('keep', [True, False])
def test_opcheck(keep):
    x, norm_weight, norm_bias, in_weight, conv_weight, conv_bias, x_weight, *core, weight, bias, out_weight = (
        layer_arguments((4, 5))
    )
    arguments = [
        x, norm_weight, norm_bias, 1e-5, in_weight, x_weight, out_weight, conv_weight, conv_bias, *core, weight, bias,
        1e-5,
    ]  # fmt: skip
    if keep:
        arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    arguments += [torch.ones(2, dtype=x.dtype) if keep else None, keep]
    torch.library.opcheck(OPS.ssm_layer.default, arguments)


def test_compiles_without_a_graph_break():
    arguments = require_grad(*layer_arguments((4, 5)))
    compiled = torch.compile(ssm_layer, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(ssm_layer(*arguments).sum(), arguments)
    for one, other in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_neither_u_nor_the_gated_norm():
    """Values per token: 2d for x and its norm, two statistics, 2E for u and z, R + 2 for dt, B and C, E for y."""
    channels, rank, tokens = 4, 2, 2 * 7 * 13
    arguments = require_grad(*layer_arguments((7, 13), channels, rank))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ssm_layer(*arguments)
    sizes = [x.numel() for x in kept if x.numel() >= tokens and x.ndim == 4]
    inner = 2 * channels
    assert sum(sizes) == tokens * (2 * channels + 2 + 2 * inner + rank + 2 + inner)


def test_same_bits_in_every_run():
    arguments = require_grad(*layer_arguments((19, 23), 40, 3, dtype=torch.float32))
    runs = []
    for _ in range(3):
        out = ssm_layer(*arguments)
        runs.append((out, *torch.autograd.grad(out, arguments, torch.ones_like(out))))
    for outputs in zip(*runs, strict=True):
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_layouts_of_the_input_do_not_matter():
    x, *others = layer_arguments((7, 13))
    expected = ssm_layer(x, *others)
    assert torch.equal(ssm_layer(x.movedim(-1, 0).contiguous().movedim(0, -1), *others), expected)
    assert torch.equal(ssm_layer(torch.cat((x, x), -1)[..., :4], *others), expected)


def test_autocast_rounds_to_its_dtype():
    arguments = require_grad(*layer_arguments((4, 5), 8, dtype=torch.float32))
    with torch.autocast('cpu', torch.bfloat16):
        out = ssm_layer(*arguments)
    assert out.dtype == torch.float32
    expected = layer_equation(*(x.double() for x in arguments))
    assert rms_error(out, expected) < TOLERANCES[torch.bfloat16][0]
    for gradient in torch.autograd.grad(out.sum(), arguments):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_empty_batch():
    arguments = require_grad(*layer_arguments((3, 4), batch=0))
    ssm_layer(*arguments).sum().backward()
    for x in arguments:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def without(position):
    """A fault that leaves an argument out."""
    return lambda *arguments: layer_equation(*arguments[:position], 0 * arguments[position], *arguments[position + 1 :])


FAULTS = {
    'first norm without its shift': without(2),
    'convolution without its bias': without(5),
    'step size without its bias': without(8),
    'D dropped': without(10),
    'gated norm without its shift': without(13),
    'another eps': lambda *arguments: layer_equation(*arguments, eps=0.5),
    'another eps of the gated norm': lambda *arguments: layer_equation(*arguments, out_eps=10.0),
    'no skip connection': lambda *arguments: layer_equation(*arguments) - arguments[0],
}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_noticed(fault, dtype):
    arguments = layer_arguments((7, 13), 8)
    assert rms_error(FAULTS[fault](*arguments), layer_equation(*arguments)) > TOLERANCES[dtype][0]


@pytest.mark.parametrize(
    ('position', 'value', 'error', 'message'),
    [
        (0, torch.ones(2, 3, 4), ValueError, 'x must have 4 dimensions'),
        (0, torch.ones(2, 0, 4, 4), ValueError, 'x must have at least one token'),
        (3, torch.ones(8, 4), ValueError, r'in_weight must have shape \(16, 4\), got \(8, 4\)'),
        (6, torch.ones(3, 8), ValueError, r'x_weight must have shape \(4, 8\), got \(3, 8\)'),
        (7, torch.ones(8), ValueError, 'dt_weight must have 2 dimensions'),
        (11, torch.ones(9, 8), ValueError, r'taps must have shape \(25, 8\), got \(9, 8\)'),
        (14, None, TypeError, 'out_weight must be a tensor, got NoneType'),
        (15, torch.ones(3), ValueError, r'scale must have shape \(2,\), got \(3,\)'),
        (15, torch.ones(2, requires_grad=True), ValueError, 'scale must not require a gradient'),
    ],
)
def test_bad_arguments(position, value, error, message):
    arguments = [*layer_arguments((3, 4)), None]
    arguments[position] = value
    with pytest.raises(error, match=f'ssm_layer: .*{message}'):
        ssm_layer(*arguments)
