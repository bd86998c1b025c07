"""The Triton kernels: interpreted against the reference, compiled ahead of time and, where there is a GPU, run on it.

The interpreter and the compiler work without a GPU, in processes of their own: `triton_interpreter_cases.py` and
`triton_compile_cases.py` say what they do.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmspatialmamba.ops.layer_norm.reference import layer_norm_backward_reference, layer_norm_reference
from mmspatialmamba.ops.library import REFERENCES, overload
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from oracles import (
    GRIDS,
    SEQUENCE_LENGTHS,
    conv_arguments,
    fusion_weights,
    norm_arguments,
    orders_arguments,
    relative_error,
    scan_inputs,
    ssm_arguments,
)

pytest.importorskip('triton', reason='Triton is not installed')

# Ten times the largest relative error of any output in the interpreter, against the reference in float64. The
# measurement beside: of the outputs in the dtype of u, then of those in float32 (A, D, taps, dt, parameters).
TOLERANCES = {
    ('depthwise_conv', 'float32'): (2.5e-6, 3e-6),  # 2.3e-7, 3.0e-7
    ('depthwise_conv', 'bfloat16'): (7e-2, 1.3e-6),  # 7.4e-3, 1.3e-7; the gradient between two passes is rounded
    ('depthwise_conv', 'float16'): (4.3e-3, 1.4e-6),  # 4.3e-4, 1.4e-7
    ('fusion_taps', 'float32'): (2e-6, 0),  # 2.1e-7; all in the dtype of the kernels
    ('fusion_taps', 'bfloat16'): (4.3e-2, 0),  # 4.4e-3
    ('fusion_taps', 'float16'): (3.8e-3, 0),  # 3.8e-4
    ('gated_norm', 'float32'): (4e-6, 2e-6),  # 3.9e-7, 1.8e-7
    ('gated_norm', 'bfloat16'): (4e-2, 1.4e-6),  # 4.7e-3, 1.4e-7
    ('gated_norm', 'float16'): (3e-3, 1.8e-6),  # 2.9e-4, 1.8e-7
    ('layer_norm', 'float32'): (2e-6, 1.5e-6),  # 2.0e-7, 1.5e-7
    ('layer_norm', 'bfloat16'): (4.7e-2, 1.3e-6),  # 4.7e-3, 1.3e-7
    ('layer_norm', 'float16'): (2.4e-3, 7e-7),  # 2.4e-4, 7.1e-8
    ('scan_states', 'float32'): (5e-6, 5e-6),  # 4.9e-7, 4.2e-7
    ('scan_states', 'bfloat16'): (6e-2, 4e-6),  # 6.0e-3, 3.5e-7
    ('scan_states', 'float16'): (5e-3, 5e-6),  # 4.7e-4, 5.2e-7
    ('selective_scan', 'float32'): (4.3e-6, 3.8e-6),  # 4.3e-7, 3.8e-7
    ('selective_scan', 'bfloat16'): (4.5e-2, 1.1e-6),  # 4.5e-3, 1.1e-7
    ('selective_scan', 'float16'): (3e-3, 2.2e-6),  # 3.0e-4, 2.2e-7
    ('state_fusion', 'float32'): (2e-6, 1e-6),  # 1.8e-7, 1.1e-7
    ('state_fusion', 'bfloat16'): (5e-2, 4e-7),  # 5.4e-3, 4.2e-8
    ('state_fusion', 'float16'): (5e-3, 7e-7),  # 4.8e-4, 6.8e-8
    ('structure_aware_ssm', 'float32'): (4e-6, 3e-6),  # 4.0e-7, 2.8e-7
    ('structure_aware_ssm', 'bfloat16'): (7e-2, 3e-6),  # 7.5e-3, 3.2e-7
    ('structure_aware_ssm', 'float16'): (4e-3, 3e-6),  # 4.3e-4, 2.8e-7
}
FLOAT32 = {'dA', 'dD', 'dtaps', 'ddt_weight', 'ddt_bias', 'dparameters', 'mean', 'inverse'}

CHECKS = {
    'conv': (
        'conv: two runs, same bits',
        'conv: a slice of a wider map is no copy',
        'conv: NaN where the reference has it',
        'conv: a padding that wraps around is seen',
        'conv: a dropped bias is seen',
        'conv: offsets beyond 2^31',
    ),
    'norm': (
        'norm: two runs, same bits',
        'norm: no output unless asked for',
        'norm: NaN stays in its token',
        'norm: a lost mean is seen',
        'norm: offsets beyond 2^31',
    ),
    'layer_norm': (
        'layer norm: two runs, same bits',
        'layer norm: NaN stays in its token',
        'layer norm: a dropped weight is seen',
        'layer norm: channels beyond the last are seen',
        'layer norm: offsets beyond 2^31',
    ),
    'taps': ('taps: transposed kernels are seen',),
    'scan': (
        'scan: two runs, same bits',
        'scan: a carry lost at a chunk border is seen',
        'scan: an adjoint carry lost at a chunk border is seen',
        'scan: offsets beyond 2^31',
        'fusion: offsets beyond 2^31',
    ),
    'orders': (
        'orders: two runs, same bits',
        'orders: NaN in one image stays there',
        'orders: a carry lost at a chunk border is seen',
        'orders: an adjoint carry lost at a chunk border is seen',
        'orders: a way in the wrong direction is seen',
        'orders: offsets beyond 2^31',
    ),
    'fusion': (
        'fusion: two runs, same bits',
        'fusion: zero instead of replicate padding is seen',
        'fusion: zero padding is seen in dtaps',
        'fusion: a border that is not folded is seen',
    ),
    'ssm': (
        'ssm: NaN in one image stays there',
        'ssm: NaN in one image stays there, backward',
        'ssm: two runs, same bits',
        'ssm: a dropped step size bias is seen',
        'ssm: relative error of the step size',
        "ssm: relative error of softplus's derivative",
    ),
}

GROUPS = {
    'depthwise_conv': 'conv', 'fusion_taps': 'taps', 'gated_norm': 'norm', 'layer_norm': 'layer_norm',
    'scan_states': 'scan', 'selective_scan': 'orders', 'state_fusion': 'fusion', 'structure_aware_ssm': 'ssm',
}  # fmt: skip
"""Group whose cases run an op."""


@functools.cache
def rows_of(group):
    """Runs the cases of a group, once, in a process of their own, and returns the rows that it prints."""
    interpreted = group in CHECKS
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    script = 'triton_interpreter_cases.py' if interpreted else 'triton_compile_cases.py'
    process = subprocess.run(
        [sys.executable, Path(__file__).parent / script, str(group)],
        env=environment | ({'TRITON_INTERPRET': '1'} if interpreted else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{')]


@pytest.mark.end_to_end
@pytest.mark.parametrize(('op', 'dtype'), TOLERANCES)
def test_interpreted_parity(op, dtype):
    (result,) = rows_of(GROUPS[op])
    maps, parameters = TOLERANCES[op, dtype]
    for name in (op, f'{op}_backward'):
        for output, error in result['errors'][f'{name} {dtype}'].items():
            tolerance = parameters if output in FLOAT32 else maps
            assert error < tolerance, f'{name} {dtype} {output}'


@pytest.mark.end_to_end
@pytest.mark.parametrize(('group', 'check'), [(group, check) for group in CHECKS for check in CHECKS[group]])
def test_interpreted_checks(group, check):
    (result,) = rows_of(group)
    assert result['checks'].keys() == set(CHECKS[group])
    assert result['checks'][check]


@pytest.mark.end_to_end
@pytest.mark.parametrize('group', [90, 80])
def test_compiles_without_spills(group):
    """Compiles every launch for a compute capability, which takes minutes; `test_kernel_report.py` compiles some."""
    rows = rows_of(group)
    print(f'\n{"kernel":22} dtype rank warps registers spilled shared   (compute capability {group})')
    for row in rows:
        rank = row['constants'].get('RANK', '-')
        print(
            f'{row["kernel"]:22} {row["dtype"]:5} {rank!s:>4} {row["warps"]:5} {row["registers"]:9}'
            f' {row["spilled"]:7} {row["shared"]:6}'
        )
    assert len({row['kernel'] for row in rows}) == 23
    for row in rows:
        assert not row['spilled'], row
        # 227 KiB of shared memory a block on Hopper, 163 on Ampere's A100
        assert row['shared'] <= 163 * 1024, row


def test_serves_cuda():
    from mmspatialmamba.ops import backends

    assert backends()['cuda'].implementation == 'triton'
    names = {name.partition('.')[0]: name for name in REFERENCES}
    for op in GROUPS:
        for name in (op, f'{op}_backward'):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f'mmspatialmamba::{names[name]}', 'CUDA')


class Registered:
    """Stands for the library, and keeps the implementation that `register` gives it."""

    def impl(self, name, implementation, key):
        assert key == 'CUDA'
        self.implementation = implementation


@pytest.fixture
def register_failing(monkeypatch):
    """Registers kernels for CUDA devices that raise an error, and returns what is called for a tensor on a CPU."""
    from mmspatialmamba.ops import triton_backend

    def register(error):
        library, calls = Registered(), []

        def kernels(*args):
            calls.append(args)
            if error and len(calls) == error[0]:
                raise error[1]
            return 'kernels'

        monkeypatch.setattr(triton_backend, 'LIBRARY', library)
        monkeypatch.setitem(triton_backend.SHAPES, 'some_op', SimpleNamespace(check_again=lambda args: None))
        monkeypatch.setitem(triton_backend.REFERENCES, 'some_op', lambda *args: 'reference')
        monkeypatch.setattr(triton_backend, 'IMPLEMENTATIONS', {})
        triton_backend.register('some_op', kernels, None)
        return library.implementation, calls

    loaded = sys.modules['mmspatialmamba.ops.backends']._loaded
    monkeypatch.setitem(loaded, 'cuda', loaded['cuda'])
    monkeypatch.delenv('MMSPATIALMAMBA_REQUIRE', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    return register


def test_first_launch_that_fails_leaves_the_device_to_the_reference(register_failing):
    from mmspatialmamba.ops import backends

    call, calls = register_failing((1, RuntimeError('no C compiler')))
    assert [call(torch.ones(1)), call(torch.ones(1))] == ['reference', 'reference']
    assert len(calls) == 1
    assert backends()['cuda'].implementation == 'reference'
    assert backends()['cuda'].reason == 'the first launch of some_op failed: RuntimeError: no C compiler'


def test_first_launch_that_fails_is_an_error_where_triton_is_required(register_failing, monkeypatch):
    monkeypatch.setenv('MMSPATIALMAMBA_REQUIRE', 'triton')
    call, _ = register_failing((1, RuntimeError('no C compiler')))
    with pytest.raises(RuntimeError, match="names 'triton', which cannot be used: the first launch of some_op failed"):
        call(torch.ones(1))


def test_other_failures_are_raised(register_failing, monkeypatch):
    """Not the first launch; out of memory; inside of a CUDA graph's capture."""
    from mmspatialmamba.ops.compat import OutOfMemoryError

    call, _ = register_failing((2, RuntimeError('illegal memory access')))
    assert call(torch.ones(1)) == 'kernels'
    with pytest.raises(RuntimeError, match='illegal memory access'):
        call(torch.ones(1))
    call, _ = register_failing((1, OutOfMemoryError('full')))
    with pytest.raises(OutOfMemoryError):
        call(torch.ones(1))
    assert call(torch.ones(1)) == 'kernels'
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    call, _ = register_failing((1, RuntimeError('operation not permitted when stream is capturing')))
    with pytest.raises(RuntimeError, match='capturing'):
        call(torch.ones(1))


# On a GPU, exponentials and divisions are approximate and products take three passes of tf32. Not measured yet: what
# float32 allows for sums of this length.
GPU_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 7e-2, torch.float16: 5e-3, torch.float64: 1e-12}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='PyTorch finds no CUDA GPU')
slow = pytest.mark.end_to_end
# A kernel is compiled for each dtype, each rank and each width that is a constant of it, for seconds: grids and lengths
# cost nothing. The unit tests compile what differs in kind; the rest belongs to the end-to-end tests.
GPU_DTYPES = [torch.float32, torch.bfloat16, torch.float64, pytest.param(torch.float16, marks=slow)]


def check_on_gpu(op, arguments, dtype):
    """Compares an op and its gradients on the GPU with the reference in float64 on the CPU, twice, bit for bit."""
    from mmspatialmamba.ops.triton_backend import IMPLEMENTATIONS

    backward_op = '_backward.'.join(op.split('.')) if '.' in op else f'{op}_backward'
    function, backward = overload(op), overload(backward_op)
    here = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = IMPLEMENTATIONS[op][1](*here)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = (function(*there), *backward(gradient.cuda(), *there))
    again = (function(*there), *backward(gradient.cuda(), *there))
    wanted = (expected, *IMPLEMENTATIONS[backward_op][1](gradient.double(), *here))
    largest = max(tensor.abs().max() for tensor in wanted if tensor.numel())
    for first, second, expected in zip(outputs, again, wanted, strict=True):
        assert torch.equal(first, second)
        assert first.shape == expected.shape
        if expected.numel():
            # A gradient may be 0: that of a decay, if there is one token. Its rounding is measured by the others.
            scale = None if expected.any() else largest
            assert relative_error(first.cpu().double(), expected, scale) < GPU_TOLERANCES[dtype]


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('length', [*SEQUENCE_LENGTHS, 31, 32, 33, 101, 5000, 100_000])
def test_scan_on_gpu(length, dtype):
    u, delta, A, B = scan_inputs(length, 40)
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    check_on_gpu('scan_states', (u.to(dtype), delta.to(dtype), A.to(parameter_dtype), B.to(dtype)), dtype)


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('channels', [5, 64, pytest.param(96, marks=slow)])
@pytest.mark.parametrize(
    'options', [(1, 'silu', False, False), (1, 'none', False, True), (2, 'relu', True, False)], ids=str
)
@pytest.mark.parametrize('grid', [*GRIDS, (40, 70)])
def test_depthwise_conv_on_gpu(grid, options, channels, dtype):
    check_on_gpu('depthwise_conv', (*conv_arguments(grid, channels, dtype), *options), dtype)


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('channels', [40, 128, pytest.param(1536, marks=slow)])
@pytest.mark.parametrize('grid', [*GRIDS, (40, 70)])
def test_gated_norm_on_gpu(grid, channels, dtype):
    check_on_gpu('gated_norm', (*norm_arguments(grid, channels, dtype), 1e-5), dtype)


@on_gpu
@pytest.mark.parametrize('out_dtype', GPU_DTYPES)
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('channels', [1, 64, pytest.param(96, marks=slow), pytest.param(3072, marks=slow)])
def test_layer_norm_on_gpu(channels, dtype, out_dtype):
    if (dtype == torch.float64) != (out_dtype == torch.float64):
        return  # autocast leaves float64 alone
    x, _, weight, bias = norm_arguments((40, 70), channels, dtype)
    wanted, *statistics = layer_norm_reference(x.double(), weight.double(), bias.double(), 1e-5, torch.float64)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(out_dtype)
    gradients = layer_norm_backward_reference(dout.double(), x.double(), *statistics, weight.double(), bias.double())

    def call():
        there = (x.cuda(), weight.cuda(), bias.cuda())
        out, mean, inverse = torch.ops.mmspatialmamba.layer_norm(*there, 1e-5, out_dtype)
        backward = torch.ops.mmspatialmamba.layer_norm_backward(dout.cuda(), there[0], mean, inverse, *there[1:])
        return out, mean, inverse, *backward

    # A single channel is its own mean: its gradient is nothing but rounding.
    compared = slice(None) if channels > 1 else slice(3)
    for first, second, expected in zip(call()[compared], call(), (wanted, *statistics, *gradients), strict=False):
        assert torch.equal(first, second)
        tolerance = max(GPU_TOLERANCES[dtype], GPU_TOLERANCES[out_dtype])
        assert relative_error(first.cpu().double(), expected) < tolerance


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('grid', [*GRIDS, (40, 70)])
def test_fusion_on_gpu(grid, dtype):
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(2, *grid, 40, generator=generator).to(dtype)
    taps = torch.randn(25, 40, generator=generator).to(torch.promote_types(dtype, torch.float32))
    check_on_gpu('state_fusion', (h, taps), dtype)


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('channels', [1, 40, 1000])
def test_taps_on_gpu(channels, dtype):
    kernels, alpha = fusion_weights(channels, dtype)
    check_on_gpu('fusion_taps', (*kernels, alpha), dtype)


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('rank', [3, 16, *(pytest.param(rank, marks=slow) for rank in (1, 4, 15, 48, 64))])
@pytest.mark.parametrize('grid', [*GRIDS, (40, 70)])
def test_core_on_gpu(grid, rank, dtype):
    check_on_gpu('structure_aware_ssm', ssm_arguments(grid, 40, rank, dtype=dtype), dtype)


@on_gpu
@pytest.mark.parametrize('dtype', GPU_DTYPES)
@pytest.mark.parametrize('states', [1, pytest.param(3, marks=slow)])
@pytest.mark.parametrize('names', [tuple(ORDERS)[:4], tuple(ORDERS)[4:]], ids=str)
@pytest.mark.parametrize('grid', [*GRIDS, (40, 70)])
def test_orders_on_gpu(grid, names, states, dtype):
    arguments = orders_arguments(grid, 40, 3, len(names), states, dtype=dtype)
    orders = [integer for name in names for integer in ORDERS[name](*grid)]
    check_on_gpu('selective_scan.orders', (*arguments, orders), dtype)
