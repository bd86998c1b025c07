"""Ops called past the public functions, by torch.ops, with arguments that do not fit: each call returns or raises.

Nothing may end the process, and nothing outside of a tensor may be read or written. Run as a script, this file fuzzes:
there each tensor ends where its memory ends, so that whoever reads on ends the process.
"""

import ctypes
import math
import mmap
import random
import subprocess
import sys
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from mmspatialmamba.ops.library import REFERENCES, SHAPES, overload
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from oracles import rms_error, use_references

IMPLEMENTATIONS = ('kernels', 'references')
ERRORS = (RuntimeError, TypeError, ValueError, IndexError)  # NotImplementedError and torch's own are among them

SIZES = {'N': 2, 'H': 3, 'W': 4, 'L': 12, 'E': 19, 'R': 2, 'K': 4, 'S': 2, 'd': 6, 'F': 24, 'stride': 1}
SCALARS = {
    'eps': 1e-5, 'out_eps': 1e-5, 'activation': 'silu', 'relu_input': True, 'residual': True,
    'with_out': True, 'keep': True, 'parameters': True, 'dtype': torch.float32,
}  # fmt: skip
BAD_SCALARS = [
    *(('eps', value) for value in (-1.0, 0.0, 1e308, -1e308, math.inf, math.nan)),
    *(('stride', value) for value in (0, -1, 3, 2**31, 2**63 - 1, -(2**63))),
    *(('activation', value) for value in ('', 'gelu', 'SILU', 'silu\0', 'x' * 10000)),
    *(('orders', value) for value in ([], [0] * 20, [2**63 - 1] * 20, [-(2**63)] * 20, [0, 1, 4, 4, 0] * 5)),
]


def size(word, sizes):
    """The size that a word of `Shapes` stands for."""
    stride = sizes['stride']
    derived = {
        '2E': 2 * sizes['E'],
        'R+2': sizes['R'] + 2,
        'H_out': -(-sizes['H'] // stride),
        'W_out': -(-sizes['W'] // stride),
        'H/2': -(-sizes['H'] // 2),
        'W/2': -(-sizes['W'] // 2),
    }
    return word if isinstance(word, int) else (sizes | derived)[word]


def scalar(name, sizes):
    """The value of an argument that is no tensor."""
    if name == 'kept':
        return None
    if name == 'orders':
        names = (list(ORDERS) * sizes['K'])[: sizes['K']]
        return [integer for one in names for integer in ORDERS[one](sizes['H'], sizes['W'])]
    return (SCALARS | sizes)[name]


def arguments_of(name, **sizes):
    """Arguments of an op that fit together, by name, in order; with some sizes others than `SIZES`."""
    arguments = dict(_arguments_of(name, *(SIZES | sizes).items()))
    if 'kept' in arguments:  # what forward keeps depends on the implementation
        outputs = call(name.removesuffix('_backward'), arguments_of(name.removesuffix('_backward'), **sizes))
        arguments['kept'] = [] if isinstance(outputs, Exception) else list(outputs[1:])
    return arguments


@lru_cache
def _arguments_of(name, *sizes):
    sizes = dict(sizes)
    generator = torch.Generator().manual_seed(0)
    shapes = {tensor: words for _, tensor, words in SHAPES[name].tensors}
    arguments = {}
    for argument in overload(name)._schema.arguments:
        if argument.name in shapes:
            words = [word for one in shapes[argument.name] for word in (('N', 'H', 'W') if one == '...' else (one,))]
            shape = [size(word, sizes) for word in words]
            arguments[argument.name] = 0.3 * torch.randn(shape, generator=generator)
        else:
            arguments[argument.name] = scalar(argument.name, sizes)
    return arguments


def call(name, arguments):
    """The outputs of an op, or the error that it raised."""
    try:
        outputs = overload(name)(*arguments.values())
    except ERRORS as error:
        return error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [tensor for output in outputs for tensor in (output if isinstance(output, list) else [output])]


@pytest.fixture(scope='module', params=IMPLEMENTATIONS)
def implementation(request):
    """What serves the CPU, or the references in its place."""
    with nullcontext() if request.param == 'kernels' else use_references():
        yield


pytestmark = [
    pytest.mark.usefixtures('implementation'),
    pytest.mark.filterwarnings('ignore:Warning only once for all operators'),
]
each_op = pytest.mark.parametrize('name', REFERENCES)
each_op_with_a_shape = pytest.mark.parametrize(
    'name', [name for name in REFERENCES if [words for _, _, words in SHAPES[name].tensors] != [('...',)]]
)


@each_op
def test_arguments_that_fit_are_taken(name):
    outputs = call(name, arguments_of(name))
    assert not isinstance(outputs, Exception), outputs


ZERO_SIZES = [
    (name, word) for name in REFERENCES for word in SIZES if any(word in words for _, _, words in SHAPES[name].tensors)
]


@pytest.mark.parametrize(('name', 'word'), ZERO_SIZES)
def test_size_zero(name, word):
    outputs = call(name, arguments_of(name, **{word: 0}))
    # The batch may be empty, as in the public functions; of what has no tokens or no channels there is no map.
    if word == SHAPES[name].tensors[0][2][0]:
        assert all(output.numel() == 0 or not output.any() for output in outputs)
    elif word in ('H', 'W', 'L', 'E', 'd'):
        assert isinstance(outputs, ERRORS)


def one_more(tensor, dim):
    return torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)


@each_op
@pytest.mark.parametrize('step', [1, -1])
def test_sizes_that_do_not_fit(name, step):
    sizes = {tensor: words for _, tensor, words in SHAPES[name].tensors}
    for tensor, words in sizes.items():
        for dim, word in enumerate(words):
            elsewhere = [
                other for one, others in sizes.items() for i, other in enumerate(others) if (one, i) != (tensor, dim)
            ]
            if word not in elsewhere and not isinstance(word, int):
                continue
            arguments = arguments_of(name)
            full, axis = arguments[tensor], dim - len(words)
            arguments[tensor] = one_more(full, axis) if step == 1 else full.narrow(axis, 0, full.shape[axis] - 1)
            assert isinstance(call(name, arguments), ERRORS), f'{tensor}, dimension {dim}'


DIMENSIONS = (lambda x: x[None], lambda x: x[..., None], lambda x: x[0], lambda x: x.sum())
KINDS = (lambda x: x.to_sparse(), lambda x: x.to_mkldnn(), lambda x: None, lambda x: 1.0)
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64)


@each_op_with_a_shape
def test_number_of_dimensions(name):
    any_leading = [tensor for _, tensor, words in SHAPES[name].tensors if words[0] == '...']
    for _, tensor, _ in SHAPES[name].tensors:
        for index, change in enumerate(DIMENSIONS):
            if any_leading == [tensor] and index in (0, 2):
                continue
            arguments = arguments_of(name)
            arguments[tensor] = change(arguments[tensor])
            assert isinstance(call(name, arguments), ERRORS), f'{tensor}, change {index}'


@each_op
def test_dtypes(name):
    """Of one tensor, and of all."""
    for dtype in DTYPES:
        for _, tensor, _ in SHAPES[name].tensors:
            arguments = arguments_of(name)
            arguments[tensor] = arguments[tensor].to(dtype)
            call(name, arguments)
        call(name, {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in arguments_of(name).items()})


@each_op_with_a_shape
def test_other_device(name):
    for _, tensor, _ in SHAPES[name].tensors:
        arguments = arguments_of(name)
        arguments[tensor] = arguments[tensor].to('meta')
        assert isinstance(call(name, arguments), ERRORS), tensor


@each_op
def test_other_kinds_of_tensors(name):
    for _, tensor, _ in SHAPES[name].tensors:
        for change in KINDS:
            arguments = arguments_of(name)
            arguments[tensor] = change(arguments[tensor])
            call(name, arguments)


SCALAR_CASES = [
    (name, argument.name, value)
    for name in REFERENCES
    for argument in overload(name)._schema.arguments
    for scalar, value in BAD_SCALARS
    if argument.name in (scalar, f'out_{scalar}')
]


@pytest.mark.parametrize(('name', 'scalar', 'value'), SCALAR_CASES)
def test_scalars_out_of_range(name, scalar, value):
    outputs = call(name, arguments_of(name) | {scalar: value})
    if scalar in ('stride', 'activation', 'orders'):
        assert isinstance(outputs, ERRORS)


def far_apart(tensor):
    """The same values, with strides beyond all memory where there is a single row, and of 0 where rows are equal."""
    strides = [2**40 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


@each_op
def test_strides(name):
    dense = arguments_of(name, N=1, H=1, L=1)
    expected = call(name, dense)
    strided = {key: far_apart(x) if isinstance(x, torch.Tensor) else x for key, x in dense.items()}
    for one, other in zip(call(name, strided), expected, strict=True):
        assert rms_error(one, other) < 1e-5
    expanded = {key: x[:1].expand_as(x) if isinstance(x, torch.Tensor) else x for key, x in arguments_of(name).items()}
    dense = {key: x.contiguous() if isinstance(x, torch.Tensor) else x for key, x in expanded.items()}
    for one, other in zip(call(name, expanded), call(name, dense), strict=True):
        assert rms_error(one, other) < 1e-5


def test_fuzzed_calls_stay_inside(request):
    """In a process of its own, whose end would be a fault."""
    implementation = request.node.callspec.params['implementation']
    done = subprocess.run(
        (sys.executable, '-X', 'faulthandler', __file__, implementation), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    returned, raised = map(int, done.stdout.split())
    assert returned > CALLS / 10
    assert raised > CALLS / 10


CALLS = 600
"""Fuzzed calls of each implementation."""


def guarded(tensor, at_end):
    """A copy whose memory ends at one that cannot be read, behind its last element or before its first."""
    if tensor.numel() == 0:
        return tensor
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for address in (start, start + page + inside):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    offset = page + (inside - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def fuzz(seed=0):
    """Calls ops with random options and sizes, of which some do not fit; prints how many calls returned and raised."""
    random.seed(seed)
    returned = 0
    for _ in range(CALLS):
        name = random.choice(list(REFERENCES))
        choice = random.choice(((1, 4, 9), (0, 1, 2, 3, 5, 17, 33)))
        sizes = {word: random.choice(choice) for word in SIZES} | {'stride': random.choice((1, 2))}
        options = {
            'activation': random.choice(('none', 'silu', 'relu')),
            'residual': random.random() < 0.5,
        }
        arguments = arguments_of(name, **sizes)
        arguments |= {key: value for key, value in options.items() if key in arguments}
        tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
        if random.random() < 0.5:
            key = random.choice(tensors)
            shape = [random.choice((size, size, 1, size + 1, max(size - 1, 0))) for size in arguments[key].shape]
            arguments[key] = torch.ones(shape, dtype=arguments[key].dtype)
        dtype, at_end = random.choice((torch.float32, torch.float64)), random.random() < 0.5
        arguments |= {key: guarded(arguments[key].to(dtype), at_end) for key in tensors}
        returned += not isinstance(call(name, arguments), Exception)
    print(returned, CALLS - returned)


if __name__ == '__main__':
    with use_references() if sys.argv[1] == 'references' else nullcontext():
        fuzz()
