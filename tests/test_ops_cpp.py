"""The compiled CPU kernels against the plain PyTorch reference: values, gradients, layouts, threads, every variant."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import mmspatialmamba.ops
import pytest
import torch
import torch.nn.functional as F
from mmspatialmamba.ops import backends
from mmspatialmamba.ops.backends import KERNELS, library_name
from mmspatialmamba.ops.compat import VERSION
from mmspatialmamba.ops.depthwise_conv.reference import depthwise_conv_backward_reference, depthwise_conv_reference
from mmspatialmamba.ops.gated_norm.reference import gated_norm_backward_reference, gated_norm_reference
from mmspatialmamba.ops.library import REFERENCES, overload
from mmspatialmamba.ops.mlp.reference import mlp_backward_reference, mlp_reference
from mmspatialmamba.ops.scan_states.reference import scan_states_backward_reference, scan_states_reference
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from mmspatialmamba.ops.selective_scan.reference import selective_scan_backward_reference, selective_scan_reference
from mmspatialmamba.ops.state_fusion.reference import state_fusion_backward_reference, state_fusion_reference
from mmspatialmamba.ops.structure_aware_ssm.reference import (
    structure_aware_ssm_backward_reference,
    structure_aware_ssm_reference,
)
from oracles import (
    conv_arguments,
    mlp_arguments,
    norm_arguments,
    orders_arguments,
    relative_error,
    scan_inputs,
    ssm_arguments,
)

pytestmark = pytest.mark.skipif(
    backends()['cpu'].implementation != 'cpp', reason=f'no C++ kernels: {backends()["cpu"].reason}'
)

OPS = torch.ops.mmspatialmamba
CAPABILITIES = ('default', 'avx2', 'avx512')

# Largest relative errors against the reference in float64, over all inputs below and the three variants; the tolerance
# is ten times that. In 16 bits the maps carry the rounding of their dtype; the gradients of the parameters are float32.
# Those are sums of terms of order 1 that may cancel: their errors are relative to 1 at least.
MEASURED = {
    # dtype: (maps, gradients of the parameters)
    torch.float64: (6.5e-15, 5.4e-15),
    torch.float32: (1.1e-6, 1.8e-6),
    torch.bfloat16: (3.8e-3, 9.2e-6),
    torch.float16: (4.9e-4, 1.2e-5),
}
DTYPES = tuple(MEASURED)

RUN = 128
LENGTHS = (1, 2, 3, RUN - 1, RUN, RUN + 1, 3 * RUN + 5)
CHANNELS = (1, 15, 16, 53)
"""A block of channels is 8 (float64), 16 (float32) or 32 (16 bits)."""
GRIDS = ((1, 1), (1, 17), (19, 1), (4, 5), (10, 11), (23, 17))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory that kernels allocate, outputs and working memory, with NaN."""
    torch.use_deterministic_algorithms(True)
    assert VERSION < (2, 2) or torch.utils.deterministic.fill_uninitialized_memory  # PyTorch 2.1 does not know it
    yield
    torch.use_deterministic_algorithms(False)


def ssm_case(grid, channels, dtype, batch=2, rank=3):
    return ssm_arguments(grid, channels, rank, batch, dtype)


def scan_case(length, channels, dtype, batch=2):
    u, delta, A, B = scan_inputs(length, channels, batch, dtype)
    return u, delta, A.to(torch.promote_types(dtype, torch.float32)), B


def fusion_case(grid, channels, dtype, batch=2):
    arguments = ssm_case(grid, channels, dtype, batch)
    return arguments[0], arguments[-1]


def orders_case(grid, channels, dtype, batch=2, rank=3, states=1, names=tuple(ORDERS)[:4]):
    orders = [integer for name in names for integer in ORDERS[name](*grid)]
    return *orders_arguments(grid, channels, rank, len(names), states, batch, dtype), orders


def gradient_like(tensor, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def error(actual, expected, is_map):
    """Largest difference, relative to the largest expected value (and to 1 for gradients of parameters)."""
    if expected.numel() == 0:
        return 0.0
    if not expected.any():
        return actual.abs().max().item()
    return relative_error(actual, expected) * (1 if is_map else min(1, expected.abs().max().item()))


def check_parity(op, reference, arguments):
    """Compares one call with the reference in float64, each output by the tolerance of its kind."""
    actual = op(*arguments)
    expected = reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    maps, parameters = MEASURED[arguments[0].dtype]
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.is_contiguous()
        is_map = one.ndim >= 3
        assert error(one, other, is_map) < 10 * (maps if is_map else parameters), f'output {index}'


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('length', LENGTHS)
def test_parity_scan_states(length, dtype):
    for channels in CHANNELS:
        arguments = scan_case(length, channels, dtype)
        check_parity(OPS.scan_states, scan_states_reference, arguments)
        dh = gradient_like(arguments[0])
        check_parity(OPS.scan_states_backward, scan_states_backward_reference, (dh, *arguments))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grid', GRIDS)
def test_parity_state_fusion(grid, dtype):
    for channels in CHANNELS:
        arguments = fusion_case(grid, channels, dtype)
        check_parity(OPS.state_fusion, state_fusion_reference, arguments)
        dg = gradient_like(arguments[0])
        check_parity(OPS.state_fusion_backward, state_fusion_backward_reference, (dg, *arguments))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grid', GRIDS)
def test_parity_structure_aware_ssm(grid, dtype):
    for channels in CHANNELS:
        arguments = ssm_case(grid, channels, dtype)
        check_parity(OPS.structure_aware_ssm, structure_aware_ssm_reference, arguments)
        dy = gradient_like(arguments[0])
        check_parity(OPS.structure_aware_ssm_backward, structure_aware_ssm_backward_reference, (dy, *arguments))


CONV_OPTIONS = (
    (1, 'none', False, True),
    (1, 'silu', False, False),
    (2, 'relu', True, False),
    (2, 'none', False, False),
)
"""Stride, activation, relu_input and residual: those of the model, and one without any."""


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('options', CONV_OPTIONS)
def test_parity_depthwise_conv(options, grid, dtype):
    for channels in CHANNELS:
        arguments = (*conv_arguments(grid, channels, dtype), *options)
        check_parity(OPS.depthwise_conv, depthwise_conv_reference, arguments)
        dy = gradient_like(OPS.depthwise_conv(*arguments))
        check_parity(OPS.depthwise_conv_backward, depthwise_conv_backward_reference, (dy, *arguments))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grid', GRIDS)
def test_parity_gated_norm(grid, dtype):
    for channels in CHANNELS[1:]:  # a single channel is its own mean, and its gradient nothing but rounding
        arguments = (*norm_arguments(grid, channels, dtype), 1e-5)
        check_parity(OPS.gated_norm, gated_norm_reference, arguments)
        dout = gradient_like(arguments[0])
        check_parity(OPS.gated_norm_backward, gated_norm_backward_reference, (dout, *arguments, True))


# Largest relative errors of forward and backward: 16 bits round norm, hidden values and products one after the other.
MLP_MEASURED = {torch.float64: 6.7e-16, torch.float32: 1.2e-6, torch.bfloat16: 9.8e-3, torch.float16: 8.4e-4}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('tokens', [1, 17, 2049])
def test_parity_mlp(tokens, dtype):
    for channels in CHANNELS[1:]:
        x, norm_weight, norm_bias, *parameters = mlp_arguments(tokens, channels, dtype)
        # Matrices and biases in the dtype of the map, as the public function passes them.
        weight1, bias1, weight2, bias2 = (parameter.to(dtype) for parameter in parameters)
        scale = torch.linspace(0, 2, tokens, dtype=torch.float64).to(dtype)
        norm, arguments = (x, norm_weight, norm_bias, 1e-5), (weight1, bias1, weight2, bias2, scale)
        out, kept = OPS.mlp(*norm, *arguments, True)
        dout = gradient_like(out)
        actual = (out, *OPS.mlp_backward(dout, *norm, weight1, weight2, scale, kept, True))
        exact_norm, exact = (
            [x.double() if isinstance(x, torch.Tensor) else x for x in part] for part in (norm, arguments)
        )
        wanted, kept = mlp_reference(*exact_norm, *exact, True)
        weight1, _, weight2, _, scale = exact
        expected = (wanted, *mlp_backward_reference(dout.double(), *exact_norm, weight1, weight2, scale, kept, True))
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert relative_error(one, other) < 10 * MLP_MEASURED[dtype], f'output {index}'
        assert torch.equal(OPS.mlp(*norm, *arguments, False)[0], out)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize(
    'options',
    [{}, {'names': tuple(ORDERS), 'states': 3, 'rank': 0}, {'names': ('columns_snake',), 'rank': 64}],
    ids=str,
)
def test_parity_selective_scan(options, grid, dtype):
    for channels in CHANNELS:
        arguments = orders_case(grid, channels, dtype, **options)
        check_parity(OPS.selective_scan.orders, selective_scan_reference, arguments)
        dy = gradient_like(arguments[0])
        check_parity(OPS.selective_scan_backward.orders, selective_scan_backward_reference, (dy, *arguments))


@pytest.mark.parametrize('rank', [1, 2, 9, 32])
def test_parity_ranks(rank):
    arguments = ssm_case((6, 9), 40, torch.float32, rank=rank)
    check_parity(OPS.structure_aware_ssm, structure_aware_ssm_reference, arguments)
    dy = gradient_like(arguments[0])
    check_parity(OPS.structure_aware_ssm_backward, structure_aware_ssm_backward_reference, (dy, *arguments))


@pytest.mark.parametrize('pre', [-200.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_parity_of_steps_from_tiny_to_huge(pre, dtype):
    u, dt, B, C, dt_weight, dt_bias, *others = ssm_case((3, 7), 19, dtype)
    arguments = (u, dt, B, C, dt_weight, torch.full_like(dt_bias, pre), *others)
    check_parity(OPS.structure_aware_ssm, structure_aware_ssm_reference, arguments)


def narrower_capabilities():
    current = torch.backends.cpu.get_cpu_capability().lower()
    return CAPABILITIES[: CAPABILITIES.index(current)] if current in CAPABILITIES else ()


def test_the_kernels_have_a_new_version_for_new_schemas():
    schemas = ''.join(sorted(str(overload(name)._schema) for name in REFERENCES))
    digest = hashlib.sha256(schemas.encode()).hexdigest()[:12]
    assert (KERNELS, digest) == (4, '13ee0ef5c2ef'), 'schemas changed: raise KERNELS in ops/backends.py and here'


def test_the_library_is_that_of_the_capability():
    capability = torch.backends.cpu.get_cpu_capability().lower()
    expected = library_name(capability if capability in CAPABILITIES else 'default') + '.'
    assert any(expected in str(library) for library in torch.ops.loaded_libraries)


@pytest.mark.parametrize('capability', narrower_capabilities())
def test_parity_of_every_variant(capability):
    """The variants for narrower vectors than those of this process, each in a process of its own."""
    if not any(Path(mmspatialmamba.ops.__file__).parent.glob(f'{library_name(capability)}.*')):
        pytest.skip(f'the variant {capability} is not built: MMSPATIALMAMBA_CPU_VARIANTS=all builds it')
    command = (sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__)
    done = subprocess.run(
        (*command, '-k', 'library or (parity and not variant and not fusion)'),
        env=os.environ | {'ATEN_CPU_CAPABILITY': capability, 'MMSPATIALMAMBA_REQUIRE': 'cpp'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'skipped' not in done.stdout


@pytest.mark.parametrize('case', ['sliced', 'permuted', 'expanded'])
def test_layouts(case):
    arguments = ssm_case((5, 6), 17, torch.float32)

    def view(tensor):
        if case == 'sliced':
            return F.pad(tensor, (2, 3))[..., 2:-3]
        if case == 'permuted':
            return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        return tensor

    if case == 'expanded':
        arguments = [x[:1].expand_as(x) for x in arguments]
    dy = gradient_like(arguments[0])
    dense = [x.contiguous() for x in (dy, *arguments)]
    viewed = [view(x) for x in (dy, *arguments)]
    assert torch.equal(OPS.structure_aware_ssm(*viewed[1:]), OPS.structure_aware_ssm(*dense[1:]))
    for one, other in zip(
        OPS.structure_aware_ssm_backward(*viewed), OPS.structure_aware_ssm_backward(*dense), strict=True
    ):
        assert torch.equal(one, other)


def all_cases(dtype=torch.float32, grid=(30, 41), channels=77, batch=1):
    """Every op with arguments: forward, backward, the arguments of forward."""
    convolutions = [
        (OPS.depthwise_conv, OPS.depthwise_conv_backward, (*conv_arguments(grid, channels, dtype, batch), *options))
        for options in CONV_OPTIONS
    ]
    return (
        *convolutions,
        (OPS.gated_norm, OPS.gated_norm_backward, (*norm_arguments(grid, channels, dtype, batch), 1e-5)),
        (OPS.gelu, OPS.gelu_backward, norm_arguments(grid, channels, dtype, batch)[:1]),
        (OPS.scan_states, OPS.scan_states_backward, scan_case(grid[0] * grid[1], channels, dtype, batch)),
        (
            OPS.selective_scan.orders,
            OPS.selective_scan_backward.orders,
            orders_case(grid, channels, dtype, batch, states=2),
        ),
        (OPS.state_fusion, OPS.state_fusion_backward, fusion_case(grid, channels, dtype, batch)),
        (OPS.structure_aware_ssm, OPS.structure_aware_ssm_backward, ssm_case(grid, channels, dtype, batch)),
    )


def all_outputs(cases):
    """The outputs of all cases, forward and backward, one after the other."""
    for forward, backward, arguments in cases:
        output = forward(*arguments)
        yield output
        yield from backward(gradient_like(output), *arguments)


@pytest.mark.parametrize('dtype', DTYPES)
def test_same_bits_for_every_run_and_number_of_threads(dtype):
    cases = all_cases(dtype)
    threads = torch.get_num_threads()
    runs = []
    for number in (1, 2, 2, 3):
        torch.set_num_threads(number)
        runs.append(list(all_outputs(cases)))
    torch.set_num_threads(threads)
    for outputs in zip(*runs, strict=True):
        for output in outputs[1:]:
            assert torch.equal(outputs[0], output)


@pytest.mark.parametrize('case', range(len(all_cases())), ids=[str(forward) for forward, *_ in all_cases()])
def test_results_are_whole_tensors_with_room_behind_them(case):
    """No views, which PyTorch would not let anyone change in place."""
    forward, _, arguments = all_cases()[case]
    result = forward(*arguments)
    assert not result._is_view()
    assert result.is_contiguous()
    assert result.storage_offset() == 0
    assert result.untyped_storage().nbytes() >= result.numel() * result.element_size() + 240


def test_empty_batch():
    for output in all_outputs(all_cases(batch=0, grid=(4, 5), channels=6)):
        assert output.numel() == 0 or not output.any()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_values_stay_in_their_image(value):
    u, *others = ssm_case((6, 7), 37, torch.float32)
    dy = gradient_like(u)
    broken_u = u.clone()
    broken_u[0, 2, 3, 4] = value
    clean = (OPS.structure_aware_ssm(u, *others), *OPS.structure_aware_ssm_backward(dy, u, *others)[:4])
    broken = (OPS.structure_aware_ssm(broken_u, *others), *OPS.structure_aware_ssm_backward(dy, broken_u, *others)[:4])
    for one, other in zip(broken, clean, strict=True):
        assert torch.equal(one[1], other[1])
    expected = structure_aware_ssm_reference(broken_u, *others)
    assert torch.equal(broken[0].isfinite(), expected.isfinite())


@pytest.mark.parametrize('position', range(4))
def test_non_finite_inputs_give_what_the_reference_gives(position):
    """In every map, at the last token of a row: what is not finite is so in the same places."""
    for value in (float('nan'), float('inf'), -float('inf')):
        arguments = list(ssm_case((6, 7), 37, torch.float32))
        arguments[position] = arguments[position].clone()
        arguments[position][0, 2, 6, 0] = value
        actual, expected = OPS.structure_aware_ssm(*arguments), structure_aware_ssm_reference(*arguments)
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize('grid', [(1, 1), (4, 5), (12, 7)])
def test_gradients_are_the_derivatives(grid):
    from mmspatialmamba.ops import scan_states, state_fusion, structure_aware_ssm

    def leaves(arguments):
        return [x.detach().clone().requires_grad_() for x in arguments]

    tokens = grid[0] * grid[1]
    assert torch.autograd.gradcheck(scan_states, leaves(scan_case(tokens, 3, torch.float64, batch=1)))
    assert torch.autograd.gradcheck(state_fusion, leaves(fusion_case(grid, 3, torch.float64, batch=1)))
    assert torch.autograd.gradcheck(structure_aware_ssm, leaves(ssm_case(grid, 3, torch.float64, batch=1, rank=2)))


def test_faults_are_noticed():
    """Each fault in the reference is larger than the loosest tolerance of the outputs that it changes."""
    loosest = 10 * max(maps for maps, _ in MEASURED.values())

    u, delta, A, B = scan_case(2 * RUN, 5, torch.float64)
    carry_lost = torch.cat(
        [
            scan_states_reference(*(x[:, part] for x in (u, delta)), A, B[:, part])
            for part in (slice(None, RUN), slice(RUN, None))
        ],
        1,
    )
    assert relative_error(OPS.scan_states(u, delta, A, B), carry_lost) > loosest

    h, taps = fusion_case((7, 8), 5, torch.float64)
    zero_padded = state_fusion_reference(F.pad(h, (0, 0, 5, 5, 5, 5)), taps)[:, 5:-5, 5:-5]
    assert relative_error(OPS.state_fusion(h, taps), zero_padded) > loosest

    *arguments, orders = orders_case((7, 8), 5, torch.float64)
    y = OPS.selective_scan.orders(*arguments, orders)
    snake = [*ORDERS['rows_snake'](7, 8), *orders[5:]]
    assert relative_error(y, selective_scan_reference(*arguments, snake)) > loosest
    once = selective_scan_reference(*arguments, orders) - arguments[0] * arguments[-1][1:].sum(0)
    assert relative_error(y, once) > loosest

    arguments = list(ssm_case((7, 8), 5, torch.float64))
    y = OPS.structure_aware_ssm(*arguments)
    arguments[5] = torch.zeros_like(arguments[5])
    assert relative_error(y, structure_aware_ssm_reference(*arguments)) > loosest


def test_direct_calls_with_bad_shapes_raise():
    arguments = list(ssm_case((4, 5), 6, torch.float32))
    arguments[1] = arguments[1][:, :2]
    with pytest.raises(RuntimeError, match='dt must have shape'):
        OPS.structure_aware_ssm(*arguments)
