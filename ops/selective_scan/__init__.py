"""The selective scan of VMamba: several orders over one map, each with its own step size, summed."""

from collections.abc import Sequence

import torch

from ..checks import check_like, check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from .orders import addresses
from .reference import selective_scan_backward_reference, selective_scan_reference


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    orders: Sequence[str] = ('rows', 'columns', 'rows_backwards', 'columns_backwards'),
) -> torch.Tensor:
    """Computes the sum of K selective scans, each over all positions of a map in an order of its own.

    For each order k and channel e, over the positions p_1 … p_HW in the sequence of that order:

    1. Step size ``delta(p) = softplus(dt_k(p) · dt_weight_{k,e} + dt_bias_{k,e})``.
    2. Scan ``h_s(p_t) = exp(delta(p_t) A_{k,e,s}) h_s(p_{t-1}) + delta(p_t) B_{k,s}(p_t) u(p_t)`` of each state s, 0
       before p_1. It runs on from line to line of the map.
    3. Observation ``y_k(p) = sum_s C_{k,s}(p) h_s(p) + D_{k,e} u(p)``.

    The output is the sum of y_k over the orders. Glossary, in the paper's letters: N images, H x W grid, E inner
    channels, K orders, R rank of the step size, S states of each channel; Δ (``delta``) step size, A decay rate, B
    input weight, C output weight, D skip weight, h state. All are dimensionless.

    Args:
        u: Input, (N, H, W, E), channels last; float32, float64, bfloat16 or float16.
        dt: Low-rank step size of each order, (N, H, W, K, R), dtype of ``u``. It belongs to a position, as B and C do:
            nothing is permuted.
        B: Input weight of each position and order, shared by all channels, (N, H, W, K, S), dtype of ``u``.
        C: Output weight of each position and order, shared by all channels, (N, H, W, K, S), dtype of ``u``.
        dt_weight: Projection of the step size, (K, E, R).
        dt_bias: Bias of the step size before softplus, (K, E).
        A: Decay rate, (K, E, S), negative.
        D: Skip weight, (K, E).
        orders: Names of the K orders, among 'rows', 'columns', 'rows_backwards', 'columns_backwards' and, with every
            second line walked backwards, 'rows_snake' and 'columns_snake'.

    Returns:
        y, (N, H, W, E), contiguous, dtype of ``u``.

    Raises:
        TypeError: An argument is no floating-point tensor, dt, B or C has another dtype than ``u``, or the orders are
            no names.
        ValueError: An argument has another shape or device than stated above, an order is unknown, or there are not K.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``u``; step size, state, observation and the
        sum over orders accumulate in float32 (float64 for float64), and the four parameters are converted to that
        dtype. Backward keeps the inputs only: of size HW·E, that is u alone. Two runs give the same bits, forward and
        backward. No double backward.

        Source: arXiv 2401.10166, 2D selective scan; discretised as in Mamba (arXiv 2312.00752).
    """
    op = 'selective_scan'
    check_tensor(op, 'u', u, 4)
    check_not_empty(op, 'u', u)
    N, H, W, E = u.shape
    check_tensor(op, 'dt', dt, 5)
    K, R = dt.shape[3:]
    check_like(op, 'dt', dt, (N, H, W, K, R), u)
    check_tensor(op, 'B', B, 5)
    S = B.shape[-1]
    check_like(op, 'B', B, (N, H, W, K, S), u)
    check_like(op, 'C', C, (N, H, W, K, S), u)
    parameters = (dt_weight, dt_bias, A, D)
    names = ('dt_weight', 'dt_bias', 'A', 'D')
    shapes = ((K, E, R), (K, E), (K, E, S), (K, E))
    for name, parameter, shape in zip(names, parameters, shapes):
        check_parameter(op, name, parameter, shape, u)
    integers = addresses(op, orders, K, H, W)
    if torch.jit.is_tracing():  # its sizes are tensors, of which it takes no list: constants, and another size raises
        integers = list(map(int, integers))
    refuse_forward_mode(op, u, dt, B, C, *parameters)
    acc = accumulation_dtype(u.dtype)
    return torch.ops.mmspatialmamba.selective_scan.orders(u, dt, B, C, *(p.to(acc) for p in parameters), integers)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.orders = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    backward = torch.ops.mmspatialmamba.selective_scan_backward.orders
    return *backward(dy, *ctx.saved_tensors, ctx.orders), None


_SHAPES = 'u: N H W E, dt: N H W K R, B: N H W K S, C: N H W K S, dt_weight: K E R, dt_bias: K E, A: K E S, D: K E'

define(
    'selective_scan.orders(Tensor u, Tensor dt, Tensor B, Tensor C, Tensor dt_weight, Tensor dt_bias, Tensor A,'
    ' Tensor D, SymInt[] orders) -> Tensor',
    _SHAPES,
    selective_scan_reference,
    lambda u, *inputs: u.new_empty(u.shape),
)
define(
    'selective_scan_backward.orders(Tensor dy, Tensor u, Tensor dt, Tensor B, Tensor C, Tensor dt_weight,'
    ' Tensor dt_bias, Tensor A, Tensor D, SymInt[] orders) -> (Tensor du, Tensor ddt, Tensor dB, Tensor dC,'
    ' Tensor ddt_weight, Tensor ddt_bias, Tensor dA, Tensor dD)',
    f'dy: N H W E, {_SHAPES}',
    selective_scan_backward_reference,
    lambda dy, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:-1]),
)
register_autograd('selective_scan.orders', _backward, _setup_context)
refuse_double_backward('selective_scan_backward.orders')
