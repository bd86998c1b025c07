"""The scan in several orders in standard ONNX operators: the blocked scan of a grid, on the positions in each order."""

from onnxscript import opset18 as op

from ..scan_states.onnx_translation import scan_grid
from .orders import split


def selective_scan(u, dt, B, C, dt_weight, dt_bias, A, D, orders):
    """Translates `mmspatialmamba.ops.selective_scan`; the lines of an order are the rows of the grid."""
    channels, states = u.shape[-1], A.shape[-1]
    u_acc = op.Reshape(op.CastLike(u, A), [0, -1, channels])
    y = op.Mul(u_acc, op.ReduceSum(D, [0], keepdims=0))
    for k, order in enumerate(split(orders)):
        length = order[3]
        there, back = (None, None) if _is_row_major(*order) else _addresses(u_acc, *order)
        dt_k, B_k, C_k = (_lines(_of_order(x, k, A), there, length) for x in (dt, B, C))
        weight, bias, A_k = (op.Gather(x, k, axis=0) for x in (dt_weight, dt_bias, A))
        delta = op.Softplus(op.Add(op.MatMul(dt_k, op.Transpose(weight, perm=[1, 0])), bias))
        delta_u = op.Mul(delta, _lines(u_acc, there, length))
        # The states of all channels side by side, those of the first state first.
        rates = op.Reshape(op.Transpose(A_k, perm=[1, 0]), [-1])
        rates.dtype = A.dtype
        b = _side_by_side([op.Mul(delta_u, op.Slice(B_k, [s], [s + 1], [-1])) for s in range(states)])
        h = scan_grid(_side_by_side([delta] * states), b, rates)
        for s in range(states):
            h_s = op.Slice(h, [s * channels], [(s + 1) * channels], [-1])
            y_s = op.Reshape(op.Mul(h_s, op.Slice(C_k, [s], [s + 1], [-1])), [0, -1, channels])
            y = op.Add(y, y_s if back is None else op.Gather(y_s, back, axis=1))
    return op.CastLike(op.Reshape(y, op.Shape(u)), u)


def _is_row_major(start, token, line, length, turn) -> bool:
    """Returns whether an order is that of memory. A size that is dynamic in the export is no number."""
    return isinstance(start, int) and isinstance(token, int) and (start, token, turn) == (0, 1, 0)


def _addresses(x, start, token, line, length, turn):
    """Returns the address of each step of an order and the step of each address, for a sequence x, (N, L, E)."""
    start, token, line, length = (_scalar(value) for value in (start, token, line, length))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    positions = op.Squeeze(op.Shape(x, start=1, end=2))
    steps = op.Range(zero, length, one)
    lines = op.Unsqueeze(op.Range(zero, op.Div(positions, length), one), [1])
    if turn:
        other_end = op.Sub(op.Sub(length, one), op.Add(steps, steps))
        steps = op.Add(steps, op.Mul(op.Mod(lines, op.Constant(value_int=2)), other_end))
    there = op.Reshape(op.Add(start, op.Add(op.Mul(lines, line), op.Mul(steps, token))), [-1])
    return there, op.ScatterElements(there, there, op.Range(zero, positions, one), axis=0)


def _scalar(value):
    return op.Constant(value_int=value) if isinstance(value, int) else op.Squeeze(value)


def _of_order(x, k, like):
    """Returns order k of a map (N, H, W, K, ·) as a sequence (N, L, ·)."""
    return op.Reshape(op.CastLike(op.Gather(x, k, axis=3), like), [0, -1, x.shape[-1]])


def _lines(x, there, length):
    """Returns a sequence (N, L, ·) as lines (N, L / length, length, ·), in the order of the addresses."""
    width = op.Shape(x, start=-1)
    x = x if there is None else op.Gather(x, there, axis=1)
    return op.Reshape(x, op.Concat(op.Constant(value_ints=[0, -1]), op.Unsqueeze(_scalar(length), [0]), width, axis=0))


def _side_by_side(parts: list):
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=-1)
