"""`structure_aware_ssm` against the loop and the convolutions: values, gradients, layouts, faults and errors."""

import pytest
import torch
from mmspatialmamba.ops import structure_aware_ssm
from mmspatialmamba.ops.structure_aware_ssm.reference import structure_aware_ssm_reference
from oracles import GRIDS, relative_error, require_grad, ssm_arguments, ssm_inputs, ssm_loop

# Ten times the largest relative error measured over GRIDS, of the reference: float32 2.1e-7, bfloat16 2.4e-3,
# float16 3.5e-4 (the last two are the rounding of the output).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2.1e-6, torch.bfloat16: 2.4e-2, torch.float16: 3.5e-3}


@pytest.mark.parametrize('grid', [*GRIDS, (30, 41)])
def test_reference_equals_the_loop(grid):
    inputs, kernels, alpha = ssm_inputs(grid)
    expected = ssm_loop(*inputs, kernels, alpha)
    assert relative_error(structure_aware_ssm_reference(*ssm_arguments(grid)), expected) < 1e-10


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('grid', GRIDS)
def test_op_equals_the_loop(grid, dtype):
    inputs, kernels, alpha = ssm_inputs(grid, dtype=dtype)
    y = structure_aware_ssm(*ssm_arguments(grid, dtype=dtype))
    expected = ssm_loop(*(x.double() for x in inputs), [kernel.double() for kernel in kernels], alpha.double())
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y.double(), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('grid', GRIDS)
def test_gradients(grid):
    arguments = require_grad(*ssm_arguments(grid, channels=3))
    assert torch.autograd.gradcheck(structure_aware_ssm, arguments)


def test_opcheck():
    arguments = tuple(require_grad(*ssm_arguments((4, 5))))
    torch.library.opcheck(torch.ops.mmspatialmamba.structure_aware_ssm.default, arguments)


def test_compiles_without_a_graph_break():
    arguments = require_grad(*ssm_arguments((4, 5)))
    compiled = torch.compile(structure_aware_ssm, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(structure_aware_ssm(*arguments).sum(), arguments)
    actual = torch.autograd.grad(compiled(*arguments).sum(), arguments)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_layouts_of_the_inputs_do_not_matter():
    u, dt, B, C, *parameters = ssm_arguments((7, 13))
    expected = structure_aware_ssm(u, dt, B, C, *parameters)
    packed = torch.cat((dt, B, C), -1)
    strided_u = torch.cat((u, u), -1)[..., 5:]
    actual = structure_aware_ssm(strided_u, *packed.split((2, 1, 1), -1), *parameters)
    assert torch.equal(actual, expected)


def test_gradient_of_a_broadcast_output_gradient():
    arguments = require_grad(*ssm_arguments((4, 5)))
    expanded = torch.ones((), dtype=torch.float64).expand(2, 4, 5, 5)
    expected = torch.autograd.grad(structure_aware_ssm(*arguments), arguments, expanded.contiguous())
    actual = torch.autograd.grad(structure_aware_ssm(*arguments), arguments, expanded)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_nan_stays_in_its_image():
    u, *others = require_grad(*ssm_arguments((4, 5)))
    clean = structure_aware_ssm(u, *others)
    broken_u = u.detach().clone()
    broken_u[0, 1, 2, 3] = float('nan')
    broken = structure_aware_ssm(broken_u, *others)
    assert torch.equal(broken[1], clean[1])
    assert broken[0].isnan().any()


def test_empty_batch():
    arguments = require_grad(*ssm_arguments((4, 5), batch=0))
    structure_aware_ssm(*arguments).sum().backward()
    for tensor in arguments:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_repeats_bit_for_bit():
    arguments = require_grad(*ssm_arguments((30, 41), channels=20, dtype=torch.float32))
    runs = [torch.autograd.grad(structure_aware_ssm(*arguments).square().sum(), arguments) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_autocast_keeps_the_dtype_of_the_input():
    arguments = ssm_arguments((4, 5), dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert structure_aware_ssm(*arguments).dtype == torch.float32
        assert structure_aware_ssm(*ssm_arguments((4, 5), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_dropped_step_bias_is_noticed():
    arguments = list(ssm_arguments((7, 13)))
    expected = structure_aware_ssm(*arguments)
    arguments[5] = torch.zeros_like(arguments[5])
    assert relative_error(structure_aware_ssm(*arguments), expected) > TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ('position', 'change', 'error', 'message'),
    [
        (0, lambda x: x[0], ValueError, 'u must have 4 dimensions'),
        (1, lambda x: x[:, 1:], ValueError, r'dt must have shape \(2, 4, 5, 2\), got \(2, 3, 5, 2\)'),
        (2, lambda x: x.float(), TypeError, 'B must have the dtype of the first argument, torch.float64'),
        (3, lambda x: x.expand(-1, -1, -1, 5), ValueError, r'C must have shape \(2, 4, 5, 1\), got \(2, 4, 5, 5\)'),
        (4, lambda x: x.T, ValueError, r'dt_weight must have shape \(5, 2\), got \(2, 5\)'),
        (6, lambda x: x[:, None], ValueError, 'A must have 1 dimensions'),
        (8, lambda x: x.T, ValueError, r'taps must have shape \(25, 5\), got \(5, 25\)'),
    ],
)
def test_bad_arguments(position, change, error, message):
    arguments = list(ssm_arguments((4, 5)))
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=f'structure_aware_ssm: .*{message}'):
        structure_aware_ssm(*arguments)
