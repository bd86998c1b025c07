"""Hypothesis over shapes, strides, dtypes and devices of the public ops, and over the backbone's arguments."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmspatialmamba.ops import (
    depthwise_conv,
    gated_norm,
    layer_norm,
    scan_states,
    selective_scan,
    state_fusion,
    structure_aware_ssm,
)
from mmspatialmamba.ops.depthwise_conv import split_gradient
from mmspatialmamba.ops.depthwise_conv.reference import depthwise_conv_backward_reference, depthwise_conv_reference
from mmspatialmamba.ops.gated_norm.reference import gated_norm_backward_reference, gated_norm_reference
from mmspatialmamba.ops.layer_norm.reference import layer_norm_backward_reference, layer_norm_reference
from mmspatialmamba.ops.scan_states.reference import scan_states_backward_reference, scan_states_reference
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from mmspatialmamba.ops.selective_scan.reference import selective_scan_backward_reference, selective_scan_reference
from mmspatialmamba.ops.state_fusion.reference import state_fusion_backward_reference, state_fusion_reference
from mmspatialmamba.ops.structure_aware_ssm.reference import (
    structure_aware_ssm_backward_reference,
    structure_aware_ssm_reference,
)
from oracles import conv_arguments, norm_arguments, orders_arguments, scan_inputs, ssm_arguments

from mmspatialmamba import SpatialMamba

# In CI the same few examples in every run; by hand, MMSPATIALMAMBA_FUZZ_EXAMPLES=2000 draws others each time.
EXAMPLES = int(os.environ.get('MMSPATIALMAMBA_FUZZ_EXAMPLES', '40'))
DEVICES = ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',)
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# Ten times the largest errors of 180 examples, relative to the largest value or to 1: maps 8.1e-16, 3.0e-7, 3.5e-3,
# 4.3e-4; gradients of parameters, sums whose terms may cancel, 6.9e-16, 1.3e-6, 4.0e-7, 6.4e-7.
TOLERANCES = {
    torch.float64: (8.1e-15, 6.9e-15),
    torch.float32: (3.0e-6, 1.3e-5),
    torch.bfloat16: (3.5e-2, 4.0e-6),
    torch.float16: (4.3e-3, 6.4e-6),
}
LAYOUTS = ('dense', 'sliced', 'permuted', 'expanded', 'strided')

dimension = st.integers(1, 40)
channels = st.integers(1, 70)
batch = st.integers(0, 3)
dtypes = st.sampled_from(list(TOLERANCES))
devices = st.sampled_from(DEVICES)
seeds = st.integers(0, 2**20)


def lay_out(tensor, layout):
    """The same values (for 'expanded' those of the first image, in all) in memory of another layout."""
    if layout == 'sliced':
        return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
    if layout == 'permuted':
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == 'expanded' and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    if layout == 'strided':
        return torch.stack((tensor, tensor), 1).flatten(0, 1)[::2]
    return tensor


def check(op, reference, backward, arguments, maps, layouts, device, seed):
    """Compares forward and backward of one call with the references in float64; the first ``maps`` are maps."""
    laid_out = [lay_out(x, layout) for x, layout in zip(arguments[:maps], layouts, strict=False)]
    arguments = [x.to(device).detach() for x in (*laid_out, *arguments[maps:])]
    leaves = [x.requires_grad_() for x in arguments]
    y = op(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad(y, leaves, dy)
    doubles = [x.detach().cpu().double() for x in leaves]
    expected = backward(dy.cpu().double(), *doubles)
    for index, (one, other) in enumerate(zip((y, *gradients), (reference(*doubles), *expected), strict=True)):
        assert one.dtype == leaves[max(index - 1, 0)].dtype
        assert one.shape == other.shape
        assert one.device.type == device
        if other.numel():
            tolerance = TOLERANCES[y.dtype][one.ndim < 3]
            largest = other.abs().max().clamp_min(1)
            assert (one.cpu().double() - other).abs().max() <= tolerance * largest, f'output {index}'


def as_parameters(arguments, dtype):
    return (x.to(torch.promote_types(dtype, torch.float32)) for x in arguments)


@FUZZ
@given(batch, st.integers(1, 400), channels, dtypes, st.tuples(*[st.sampled_from(LAYOUTS)] * 3), devices, seeds)
def test_scan_states(batch, length, channels, dtype, layouts, device, seed):
    u, delta, A, B = scan_inputs(length, channels, batch, dtype, seed)
    (A,) = as_parameters((A,), dtype)

    def scan(u, delta, B, A):
        return scan_states(u, delta, A, B)

    def reference(u, delta, B, A):
        return scan_states_reference(u, delta, A, B)

    def backward(dh, u, delta, B, A):
        du, ddelta, dA, dB = scan_states_backward_reference(dh, u, delta, A, B)
        return du, ddelta, dB, dA

    check(scan, reference, backward, (u, delta, B, A), 3, layouts, device, seed)


@FUZZ
@given(batch, dimension, dimension, channels, dtypes, st.sampled_from(LAYOUTS), devices, seeds)
def test_state_fusion(batch, height, width, channels, dtype, layout, device, seed):
    arguments = ssm_arguments((height, width), channels, 1, batch, dtype, seed)
    check(
        state_fusion, state_fusion_reference, state_fusion_backward_reference,
        (arguments[0], arguments[-1]), 1, (layout,), device, seed,
    )  # fmt: skip


@FUZZ
@given(
    batch, dimension, dimension, channels, st.integers(0, 12), dtypes, st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    devices, seeds,
)  # fmt: skip
def test_structure_aware_ssm(batch, height, width, channels, rank, dtype, layouts, device, seed):
    check(
        structure_aware_ssm, structure_aware_ssm_reference, structure_aware_ssm_backward_reference,
        ssm_arguments((height, width), channels, rank, batch, dtype, seed), 4, layouts, device, seed,
    )  # fmt: skip


@FUZZ
@given(
    batch, st.integers(1, 20), st.integers(1, 20), channels, st.integers(0, 12), st.integers(1, 3),
    st.lists(st.sampled_from(list(ORDERS)), min_size=1, max_size=4), dtypes,
    st.tuples(*[st.sampled_from(LAYOUTS)] * 4), devices, seeds,
)  # fmt: skip
def test_selective_scan(batch, height, width, channels, rank, states, names, dtype, layouts, device, seed):
    orders = [integer for name in names for integer in ORDERS[name](height, width)]
    check(
        lambda *tensors: selective_scan(*tensors, names),
        lambda *tensors: selective_scan_reference(*tensors, orders),
        lambda *tensors: selective_scan_backward_reference(*tensors, orders),
        orders_arguments((height, width), channels, rank, len(names), states, batch, dtype, seed), 4, layouts, device,
        seed,
    )  # fmt: skip


@FUZZ
@given(
    batch, dimension, dimension, channels, dtypes, st.sampled_from(LAYOUTS), devices, seeds,
    st.tuples(st.sampled_from((1, 2)), st.sampled_from(('none', 'silu', 'relu')), st.booleans(), st.booleans()),
)  # fmt: skip
def test_depthwise_conv(batch, height, width, channels, dtype, layout, device, seed, options):
    stride, activation, relu_input, residual = options
    named = {
        'stride': stride, 'activation': activation, 'relu_input': relu_input, 'residual': residual and stride == 1,
    }  # fmt: skip

    def bind(function):
        return lambda *tensors: function(*tensors, **named)

    def backward(*tensors):
        dx, dparameters = depthwise_conv_backward_reference(*tensors, **named)
        return dx, *split_gradient(dparameters)

    check(
        bind(depthwise_conv), bind(depthwise_conv_reference), backward,
        conv_arguments((height, width), channels, dtype, batch, seed), 1, (layout,), device, seed,
    )  # fmt: skip


@FUZZ
@given(
    batch, dimension, dimension, st.integers(8, 70), dtypes, st.tuples(*[st.sampled_from(LAYOUTS)] * 2), devices,
    seeds, st.sampled_from((1e-5, 1.0)),
)  # fmt: skip
def test_gated_norm(batch, height, width, channels, dtype, layouts, device, seed, eps):
    """Of eight channels or more: fewer may be nearly equal, and their deviation divides what was rounded."""

    def bind(function):
        return lambda *tensors: function(*tensors, eps)

    def backward(*tensors):
        dy, dz, dparameters, _ = gated_norm_backward_reference(*tensors, eps)
        return dy, dz, *dparameters

    check(
        bind(gated_norm), bind(gated_norm_reference), backward,
        norm_arguments((height, width), channels, dtype, batch, seed), 2, layouts, device, seed,
    )  # fmt: skip


@FUZZ
@given(
    batch, dimension, dimension, st.integers(8, 70), dtypes, st.sampled_from(LAYOUTS), devices, seeds,
    st.sampled_from((1e-5, 1.0)),
)  # fmt: skip
def test_layer_norm(batch, height, width, channels, dtype, layout, device, seed, eps):
    """Of eight channels or more, as those of `gated_norm`."""

    def reference(*tensors):
        return layer_norm_reference(*tensors, eps, torch.float64)[0]

    def backward(dout, x, *parameters):
        _, *statistics = layer_norm_reference(x, *parameters, eps, torch.float64)
        dx, dparameters = layer_norm_backward_reference(dout, x, *statistics, *parameters)
        return dx, *dparameters

    x, _, *parameters = norm_arguments((height, width), channels, dtype, batch, seed)
    check(lambda *tensors: layer_norm(*tensors, eps), reference, backward, (x, *parameters), 1, (layout,), device, seed)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10), st.floats(), st.sampled_from(['', '1', 'tiny']),
    st.lists(st.integers(-3, 3)), st.just(torch.ones(2)), st.just(torch.ones(2, 5, 1)),
    st.just(torch.ones(2, 5, 1, dtype=torch.int64)),
)  # fmt: skip


@FUZZ
@given(st.integers(0, 3), anything)
def test_a_wrong_argument_of_an_op_is_named(position, value):
    arguments = list(scan_inputs(5, channels=2, dtype=torch.float32))
    if isinstance(value, torch.Tensor) and value.shape == arguments[position].shape and value.dtype == torch.float32:
        return
    arguments[position] = value
    with pytest.raises((TypeError, ValueError)) as caught:
        scan_states(*arguments)
    name = ('u', 'delta', 'A', 'B')[position]
    # A wrong u may be a tensor that does not fit to the others, which are compared with it.
    assert str(caught.value).startswith('scan_states: ' + ('' if position == 0 else f'{name} must '))


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            'in_channels': anything,
            'out_indices': anything,
            'drop_path_rate': anything,
            'frozen_stages': anything,
            'norm_eval': anything,
            'with_cp': anything,
        },
    ),
    st.fixed_dictionaries({'embed_dims': st.integers(-1, 9), 'depths': st.one_of(anything, st.just((1, 1, 1, 1)))}),
)
def test_the_backbone_is_built_or_names_the_argument(arguments, arch):
    """Whatever the arguments: a backbone whose maps are those asked for, or one error that names an argument."""
    try:
        model = SpatialMamba(arch, **arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert message.startswith('SpatialMamba: ')
        assert any(name in message for name in (*arguments, 'embed_dims', 'depths'))
        return
    with torch.no_grad():
        maps = model.eval()(torch.zeros(1, arguments.get('in_channels', 3), 9, 17))
    assert [one.shape[1] for one in maps] == [model.channels[index] for index in model.out_indices]
