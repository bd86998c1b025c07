"""The gradients of every op, of the kernels that serve the CPU and of the reference, against float64.

What is expected comes from PyTorch's own derivative of the plain forward functions, so that no backward kernel is
compared with itself. These tests need PyTorch alone, and no feature that its older versions lack.
"""

from contextlib import nullcontext

import pytest
import torch
from mmspatialmamba.ops.depthwise_conv.reference import depthwise_conv_reference
from mmspatialmamba.ops.fusion_taps.reference import fusion_taps_reference
from mmspatialmamba.ops.gated_norm.reference import gated_norm_reference
from mmspatialmamba.ops.gelu.reference import gelu_reference
from mmspatialmamba.ops.layer_norm.reference import layer_norm_reference
from mmspatialmamba.ops.library import REFERENCES
from mmspatialmamba.ops.mlp.reference import mlp_reference
from mmspatialmamba.ops.scan_states.reference import scan_states_reference
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from mmspatialmamba.ops.selective_scan.reference import selective_scan_reference
from mmspatialmamba.ops.state_fusion.reference import state_fusion_reference
from mmspatialmamba.ops.structure_aware_ssm.reference import structure_aware_ssm_reference
from oracles import (
    conv_arguments,
    downsample_arguments,
    layer_arguments,
    mlp_arguments,
    norm_arguments,
    orders_arguments,
    require_grad,
    rms_error,
    scan_inputs,
    ssm_arguments,
    use_references,
)

from mmspatialmamba import ops

GRID, CHANNELS = (7, 13), 37
"""Rows and columns are no multiple of a tile, channels none of a vector."""


def layer_reference(
    x, norm_weight, norm_bias, in_weight, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, taps,
    out_norm_weight, out_norm_bias, out_weight,
):  # fmt: skip
    """`ssm_layer` from the plain forms of its parts."""
    norm = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    u, z = (norm @ in_weight.T).chunk(2, -1)
    u = depthwise_conv_reference(u, conv_weight, conv_bias, 1, 'silu', False, False)
    steps = (u @ x_weight.T).split((dt_weight.shape[1], 1, 1), -1)
    y = structure_aware_ssm_reference(u, *steps, dt_weight, dt_bias, A, D, taps)
    return x + gated_norm_reference(y, z, out_norm_weight, out_norm_bias, 1e-5) @ out_weight.T


def scan_case(dtype):
    u, delta, A, B = scan_inputs(91, CHANNELS, dtype=dtype)
    return u, delta, A.to(torch.promote_types(dtype, torch.float32)), B


def fusion_case(dtype):
    arguments = ssm_arguments(GRID, CHANNELS, dtype=dtype)
    return arguments[0], arguments[-1]


def taps_case(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(CHANNELS, 1, 3, 3)] * 3 + [(3,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def layer_norm_case(dtype):
    x, _, weight, bias = norm_arguments(GRID, CHANNELS, dtype)
    return x, weight, bias


def conv_case(**options):
    """The public function and the plain one with the options, and the arguments."""
    values = {'stride': 1, 'activation': 'none', 'relu_input': False, 'residual': False} | options
    return (
        lambda *tensors: ops.depthwise_conv(*tensors, **options),
        lambda *tensors: depthwise_conv_reference(*tensors, *values.values()),
        lambda dtype: conv_arguments(GRID, CHANNELS, dtype),
    )


def orders_case(orders, states):
    """The public function and the plain one with the orders, and the arguments."""
    integers = [integer for name in orders for integer in ORDERS[name](*GRID)]
    return (
        lambda *tensors: ops.selective_scan(*tensors, orders),
        lambda *tensors: selective_scan_reference(*tensors, integers),
        lambda dtype: orders_arguments(GRID, CHANNELS, 3, len(orders), states, dtype=dtype),
    )


# The public function, its plain differentiable form, the arguments of a dtype.
CASES = {
    'depthwise_conv-residual': conv_case(residual=True),
    'depthwise_conv-silu': conv_case(activation='silu'),
    'depthwise_conv-relu-stride2': conv_case(stride=2, activation='relu', relu_input=True),
    'downsample': (
        ops.downsample,
        lambda x, *others: depthwise_conv_reference(
            torch.nn.functional.linear(x, *others[:2]), *others[2:], 2, 'relu', True, False
        ),
        lambda dtype: downsample_arguments(GRID, CHANNELS, dtype=dtype),
    ),
    'gated_norm': (
        ops.gated_norm,
        lambda *tensors: gated_norm_reference(*tensors, 1e-5),
        lambda dtype: norm_arguments(GRID, CHANNELS, dtype),
    ),
    'fusion_taps': (ops.fusion_taps, fusion_taps_reference, taps_case),
    'gelu': (ops.gelu, gelu_reference, lambda dtype: norm_arguments(GRID, CHANNELS, dtype)[:1]),
    'layer_norm': (ops.layer_norm, lambda *x: layer_norm_reference(*x, 1e-5, torch.float64)[0], layer_norm_case),
    'mlp': (
        ops.mlp,
        lambda x, weight, bias, *others: mlp_reference(x, weight, bias, 1e-5, *others, None, False)[0],
        lambda dtype: mlp_arguments(91, CHANNELS, dtype),
    ),
    'scan_states': (ops.scan_states, scan_states_reference, scan_case),
    'selective_scan': orders_case(('rows', 'columns', 'rows_backwards', 'columns_backwards'), 1),
    'selective_scan-states': orders_case(('columns_snake', 'rows_snake'), 3),
    'ssm_layer': (ops.ssm_layer, layer_reference, lambda dtype: layer_arguments(GRID, 19, 3, dtype=dtype)),
    'state_fusion': (ops.state_fusion, state_fusion_reference, fusion_case),
    'structure_aware_ssm': (
        ops.structure_aware_ssm,
        structure_aware_ssm_reference,
        lambda dtype: ssm_arguments(GRID, CHANNELS, 3, dtype=dtype),
    ),
}

# Ten times the largest relative root-mean-square error measured over all cases and both implementations, with PyTorch
# 2.6 and 2.13 on AVX-512: 1.4e-15, 7.9e-7, 2.5e-2, 2.3e-3. In bfloat16 less, so that a gradient that is off by a factor
# of 1.05 does not pass.
TOLERANCES = {torch.float64: 1.4e-14, torch.float32: 7.9e-6, torch.bfloat16: 4e-2, torch.float16: 2.3e-2}


@pytest.fixture(params=['kernels', 'reference'])
def implementation(request):
    """What computes the ops on the CPU: what `backends` says, or the reference in its place."""
    with nullcontext() if request.param == 'kernels' else use_references():
        yield


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('implementation')
@pytest.mark.filterwarnings('ignore:Warning only once for all operators')
def test_gradients(case, dtype):
    function, plain, arguments_of = CASES[case]
    arguments = require_grad(*arguments_of(dtype))
    exact = require_grad(*(x.double() for x in arguments))
    out, expected = function(*arguments), plain(*exact)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(out, arguments, dout)
    assert rms_error(out, expected) < TOLERANCES[dtype], 'output'
    expected_gradients = torch.autograd.grad(expected, exact, dout.double())
    for index, (one, other) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert rms_error(one, other) < TOLERANCES[dtype], f'gradient of argument {index}'


def test_every_op_has_its_gradients_tested():
    public = {name for name in ops.__all__ if hasattr(torch.ops.mmspatialmamba, name)}
    assert public == {case.partition('-')[0] for case in CASES}
    assert public == {name.partition('.')[0] for name in REFERENCES} - {f'{name}_backward' for name in public}
