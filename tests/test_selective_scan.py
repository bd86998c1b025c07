"""`selective_scan` against the loop over positions: values, gradients, orders, layouts, export, faults and errors."""

import pytest
import torch
import torch.nn as nn
from mmspatialmamba.ops import selective_scan
from mmspatialmamba.ops.selective_scan.orders import ORDERS, check_orders, visited
from mmspatialmamba.ops.selective_scan.reference import selective_scan_backward_reference, selective_scan_reference
from oracles import GRIDS, VISITS, orders_arguments, orders_loop, relative_error, require_grad

OP = torch.ops.mmspatialmamba.selective_scan.orders
FOUR = ('rows', 'columns', 'rows_backwards', 'columns_backwards')
"""VMamba's orders, the default."""

# Ten times the largest relative error measured over GRIDS, of the reference: float32 1.2e-7, bfloat16 2.9e-3,
# float16 3.8e-4 (the last two are the rounding of the output).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1.2e-6, torch.bfloat16: 2.9e-2, torch.float16: 3.8e-3}


def integers(grid, names=FOUR):
    return [integer for name in names for integer in ORDERS[name](*grid)]


@pytest.mark.parametrize('name', ORDERS)
@pytest.mark.parametrize('grid', GRIDS)
def test_an_order_visits_the_positions_in_its_sequence(grid, name):
    order = ORDERS[name](*grid)
    check_orders('op', order, 1, grid[0] * grid[1])
    addresses = visited(order, grid[0] * grid[1], torch.device('cpu'))
    assert addresses.tolist() == [i * grid[1] + j for i, j in VISITS[name](*grid)]


@pytest.mark.parametrize('names', [FOUR, tuple(ORDERS), ('columns',)], ids='-'.join)
@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('grid', GRIDS)
def test_reference_equals_the_loop(grid, states, names):
    arguments = orders_arguments(grid, orders=len(names), states=states)
    actual = selective_scan_reference(*arguments, integers(grid, names))
    assert relative_error(actual, orders_loop(*arguments, names)) < 1e-10


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('grid', GRIDS)
def test_op_equals_the_loop(grid, dtype):
    arguments = orders_arguments(grid, dtype=dtype)
    y = selective_scan(*arguments)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y.double(), orders_loop(*(x.double() for x in arguments), FOUR)) < TOLERANCES[dtype]


@pytest.mark.parametrize('states', [1, 2])
@pytest.mark.parametrize('grid', [(1, 1), (1, 17), (19, 1), (4, 5)])
def test_gradients(grid, states):
    arguments = require_grad(*orders_arguments(grid, channels=2, states=states, batch=1))
    assert torch.autograd.gradcheck(selective_scan, arguments)


@pytest.mark.parametrize('grid', GRIDS)
def test_backward_reference_is_the_derivative_of_the_loop(grid):
    names = tuple(ORDERS)
    arguments = require_grad(*orders_arguments(grid, orders=len(names), states=2))
    y = orders_loop(*arguments, names)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(y, arguments, dy)
    with torch.no_grad():
        actual = selective_scan_backward_reference(dy, *arguments, integers(grid, names))
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-10


def test_opcheck():
    arguments = require_grad(*orders_arguments((4, 5)))
    torch.library.opcheck(OP, (*arguments, integers((4, 5))))


def test_compiles_without_a_graph_break():
    compiled = torch.compile(selective_scan, fullgraph=True, backend='aot_eager', dynamic=True)
    for grid in ((4, 5), (7, 3)):
        arguments = require_grad(*orders_arguments(grid))
        expected = torch.autograd.grad(selective_scan(*arguments).sum(), arguments)
        actual = torch.autograd.grad(compiled(*arguments).sum(), arguments)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


class InFourOrders(nn.Module):
    """The op as a module whose arguments have names: PyTorch 2.9 checks no sizes of those that have none."""

    def forward(self, u, dt, B, C, dt_weight, dt_bias, A, D):
        return selective_scan(u, dt, B, C, dt_weight, dt_bias, A, D)


def test_an_exported_program_takes_another_grid():
    """The integers of the orders depend on the grid, and are computed in the program."""
    grid = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(InFourOrders(), orders_arguments((4, 5)), dynamic_shapes=(grid,) * 4 + (None,) * 4)
    for grid in ((4, 5), (9, 6)):
        arguments = orders_arguments(grid)
        assert torch.equal(program.module()(*arguments), selective_scan(*arguments))


def test_layouts_of_the_inputs_do_not_matter():
    u, dt, B, C, *parameters = orders_arguments((7, 13))
    expected = selective_scan(u, dt, B, C, *parameters)
    packed = torch.cat((dt, B, C), -1)
    strided_u = torch.cat((u, u), -1)[..., 5:]
    assert torch.equal(selective_scan(strided_u, *packed.split((2, 1, 1), -1), *parameters), expected)
    permuted = u.movedim(-1, 0).contiguous().movedim(0, -1)
    actual = selective_scan(permuted, dt, B, C, *parameters)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


def test_gradient_of_a_broadcast_output_gradient():
    arguments = require_grad(*orders_arguments((4, 5)))
    expanded = torch.ones((), dtype=torch.float64).expand(2, 4, 5, 5)
    expected = torch.autograd.grad(selective_scan(*arguments), arguments, expanded.contiguous())
    actual = torch.autograd.grad(selective_scan(*arguments), arguments, expanded)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_the_inputs_alone():
    kept = []
    arguments = require_grad(*orders_arguments((4, 5)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*arguments)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in arguments)


def test_nan_stays_in_its_image():
    u, *others = orders_arguments((4, 5))
    clean = selective_scan(u, *others)
    broken_u = u.clone()
    broken_u[0, 1, 2, 3] = float('nan')
    broken = selective_scan(broken_u, *others)
    assert torch.equal(broken[1], clean[1])
    assert broken[0, ..., 3].isnan().all()  # two of the orders start before it, two behind it


def test_empty_batch():
    arguments = require_grad(*orders_arguments((4, 5), batch=0))
    selective_scan(*arguments).sum().backward()
    for tensor in arguments:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_repeats_bit_for_bit():
    arguments = require_grad(*orders_arguments((30, 41), channels=20, dtype=torch.float32))
    runs = [torch.autograd.grad(selective_scan(*arguments).square().sum(), arguments) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_autocast_keeps_the_dtype_of_the_input():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert selective_scan(*orders_arguments((4, 5), dtype=dtype)).dtype == dtype


def test_double_backward_raises():
    arguments = require_grad(*orders_arguments((2, 3)))
    (du,) = torch.autograd.grad(selective_scan(*arguments).sum(), arguments[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'selective_scan_backward.*double backward is not supported'):
        du.sum().backward()


def test_faults_are_noticed():
    """The state lost at the end of each line, a dropped step bias, an order in the place of another, a skip once."""
    grid = (7, 13)
    arguments = orders_arguments(grid)
    expected = selective_scan(*arguments)
    u, dt, B, C, dt_weight, dt_bias, A, D = arguments
    by_rows = [selective_scan(*(x[:, i : i + 1] for x in (u, dt, B, C)), *arguments[4:]) for i in range(grid[0])]
    faults = (
        torch.cat(by_rows, 1),
        selective_scan(u, dt, B, C, dt_weight, torch.zeros_like(dt_bias), A, D),
        selective_scan(*arguments, ('rows', 'columns', 'columns_backwards', 'rows_backwards')),
        selective_scan(*arguments, ('rows_snake', *FOUR[1:])),
        expected - u * D[1:].sum(0),
    )
    for fault in faults:
        assert relative_error(fault, expected) > TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ('position', 'change', 'error', 'message'),
    [
        (0, lambda x: x[0], ValueError, 'u must have 4 dimensions'),
        (1, lambda x: x[:, 1:], ValueError, r'dt must have shape \(2, 4, 5, 4, 2\), got \(2, 3, 5, 4, 2\)'),
        (2, lambda x: x.float(), TypeError, 'B must have the dtype of the first argument, torch.float64'),
        (3, lambda x: x[:, :, :, :3], ValueError, r'C must have shape \(2, 4, 5, 4, 1\), got \(2, 4, 5, 3, 1\)'),
        (4, lambda x: x.mT, ValueError, r'dt_weight must have shape \(4, 5, 2\), got \(4, 2, 5\)'),
        (6, lambda x: x[..., 0], ValueError, 'A must have 3 dimensions'),
        (7, lambda x: x[:1], ValueError, r'D must have shape \(4, 5\), got \(1, 5\)'),
        (8, lambda x: x[:3], ValueError, 'orders must be as many as dt has, 4, got 3'),
        (8, lambda x: 'rows', TypeError, "orders must be a sequence of names, got 'rows'"),
        (8, lambda x: (0, 1, 2, 3), TypeError, r'orders must be a sequence of names, got \(0, 1, 2, 3\)'),
        (8, lambda x: ('diagonal', *x[1:]), ValueError, "orders must be among rows, .*, got 'diagonal'"),
    ],
)
def test_bad_arguments(position, change, error, message):
    arguments = [*orders_arguments((4, 5)), FOUR]
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=f'selective_scan: .*{message}'):
        selective_scan(*arguments)


# On a grid of 4 x 5, beside orders that fit.
BAD_ORDERS = {
    'past the last': (1, 1, 5, 5, 0),
    'before the first': (-1, 1, 5, 5, 0),
    'gaps': (0, 2, 5, 5, 0),
    'overlap': (0, 1, 4, 5, 0),
    'all at one place': (0, 0, 0, 5, 0),
    'no length': (0, 1, 5, 0, 0),
    'negative length': (0, 1, 5, -5, 0),
    'a length that does not divide': (0, 1, 3, 3, 0),
    'another turn': (0, 1, 5, 5, 2),
    'huge strides': (0, 2**63 - 1, 5, 5, 0),
    'huge start': (-(2**63), 1, 5, 5, 0),
    'huge length': (0, 1, 5, 2**63 - 1, 0),
    'smallest stride': (0, -(2**63), -(2**63), 5, 0),
}


@pytest.mark.parametrize('bad', BAD_ORDERS)
def test_orders_that_do_not_visit_each_position_once_raise(bad):
    arguments, orders = orders_arguments((4, 5)), integers((4, 5))
    dy = torch.ones_like(arguments[0])
    orders[5:10] = BAD_ORDERS[bad]
    for call in (
        lambda: OP(*arguments, orders),
        lambda: torch.ops.mmspatialmamba.selective_scan_backward.orders(dy, *arguments, orders),
    ):
        with pytest.raises((ValueError, RuntimeError), match='each order must visit each of the 20 positions once'):
            call()


@pytest.mark.parametrize('count', [0, 19, 21, 25])
def test_another_number_of_integers_raises(count):
    orders = (2 * integers((4, 5)))[:count]
    with pytest.raises((ValueError, RuntimeError), match=f'orders must be 5 integers for each of 4, got {count}'):
        OP(*orders_arguments((4, 5)), orders)
