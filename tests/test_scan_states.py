"""`scan_states` against the token-by-token loop: values, gradients, layouts, faults and errors."""

import pytest
import torch
from mmspatialmamba.ops import scan_states
from mmspatialmamba.ops.scan_states.reference import linear_recurrence, scan_states_reference
from oracles import SEQUENCE_LENGTHS, relative_error, require_grad, scan_inputs, scan_loop

# Ten times the largest relative error measured over SEQUENCE_LENGTHS, of the reference: float32 5.8e-8, bfloat16
# 2.6e-3, float16 2.3e-4 (the last two are the rounding of the output).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5.8e-7, torch.bfloat16: 2.6e-2, torch.float16: 2.3e-3}


@pytest.mark.parametrize('length', [*SEQUENCE_LENGTHS, 1000])
def test_reference_equals_the_loop(length):
    arguments = scan_inputs(length)
    assert relative_error(scan_states_reference(*arguments), scan_loop(*arguments)) < 1e-10


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('length', SEQUENCE_LENGTHS)
def test_op_equals_the_loop(length, dtype):
    u, delta, A, B = scan_inputs(length, dtype=dtype)
    h = scan_states(u, delta, A, B)
    assert h.dtype == dtype
    assert h.is_contiguous()
    assert relative_error(h.double(), scan_loop(u.double(), delta.double(), A.double(), B.double())) < TOLERANCES[dtype]


@pytest.mark.parametrize('length', SEQUENCE_LENGTHS)
def test_gradients(length):
    assert torch.autograd.gradcheck(scan_states, require_grad(*scan_inputs(length, channels=3)))


def test_gradients_equal_those_of_the_loop():
    arguments = require_grad(*scan_inputs(300))
    weight = torch.randn(2, 300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((scan_loop(*arguments) * weight).sum(), arguments)
    actual = torch.autograd.grad((scan_states(*arguments) * weight).sum(), arguments)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-10


def test_opcheck():
    torch.library.opcheck(torch.ops.mmspatialmamba.scan_states.default, tuple(require_grad(*scan_inputs(7))))


def test_layouts_of_the_inputs_do_not_matter():
    u, delta, A, B = scan_inputs(17)
    expected = scan_states(u, delta, A, B)
    permuted = u.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    sliced = torch.stack((delta, delta), -1)[..., 0]
    expanded = B[:1].expand(2, -1, -1)
    assert torch.equal(scan_states(permuted, sliced, A, B), expected)
    assert torch.equal(scan_states(u, delta, A, expanded), scan_states(u, delta, A, expanded.contiguous()))


def test_empty_batch():
    u, delta, A, B = require_grad(*scan_inputs(4, batch=0))
    h = scan_states(u, delta, A, B)
    h.sum().backward()
    assert h.shape == (0, 4, 5)
    assert torch.equal(A.grad, torch.zeros_like(A))


def test_long_sequence_stays_exact():
    u, delta, A, B = scan_inputs(20000, channels=2, batch=1)
    assert relative_error(scan_states(u, delta, A, B), scan_loop(u, delta, A, B)) < 1e-10


def test_a_lost_carry_is_noticed():
    u, delta, A, B = scan_inputs(53)
    a, b = torch.exp(delta * A), delta * B * u
    faulty = torch.cat((linear_recurrence(a[:, :16], b[:, :16]), linear_recurrence(a[:, 16:], b[:, 16:])), 1)
    assert relative_error(faulty, scan_loop(u, delta, A, B)) > TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ('name', 'change', 'error', 'message'),
    [
        ('u', lambda x: x.numpy(), TypeError, 'u must be a tensor, got ndarray'),
        ('u', lambda x: x.long(), TypeError, 'u must have one of the dtypes float32, .*got torch.int64'),
        ('u', lambda x: x[0], ValueError, r'u must have 3 dimensions, got shape \(7, 5\)'),
        ('u', lambda x: x[:, :0], ValueError, r'at least one token and one channel, got shape \(2, 0, 5\)'),
        ('delta', lambda x: x[:, 1:], ValueError, r'delta must have shape \(2, 7, 5\), got \(2, 6, 5\)'),
        ('delta', lambda x: x.float(), TypeError, 'delta must have the dtype of the first argument'),
        ('A', lambda x: x[:4], ValueError, r'A must have shape \(5,\), got \(4,\)'),
        ('B', lambda x: x[..., 0], ValueError, r'B must have 3 dimensions'),
        ('B', lambda x: x.to('meta'), ValueError, 'B must be on the device of the first argument, cpu, got meta'),
    ],
)
def test_bad_arguments(name, change, error, message):
    arguments = dict(zip(('u', 'delta', 'A', 'B'), scan_inputs(7), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f'scan_states: .*{message}'):
        scan_states(**arguments)


def test_double_backward_is_refused():
    u, *others = require_grad(*scan_inputs(4))
    (du,) = torch.autograd.grad(scan_states(u, *others).sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match='scan_states_backward has no derivative'):
        du.sum().backward()
