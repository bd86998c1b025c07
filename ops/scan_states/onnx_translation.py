"""The scan in standard ONNX operators.

It is blocked by the rows of the grid: one ONNX Scan walks over the columns of all rows at once, a second one over
the rows to carry their last states, so that an image of H x W tokens takes W + H steps instead of H·W. The decay from
the start of a row is the exponential of a running sum, at most 1, and never divided by.

Two habits keep OpenVINO right, which says nothing where it is wrong: every input of a body has an element type, without
which maps of 0 x 0 come out; and a body returns the state it was given, not the new one, whose memory would be shared
with the carried state (OpenVINO 2026.4.1).
"""

from onnxscript import FLOAT, graph, ir, script
from onnxscript import opset18 as op


def scan_grid(delta, b, A):
    """Computes ``h_t = exp(delta_t A) h_{t-1} + b_t``, ``h_0 = 0``, over the tokens of a grid in row-major order.

    Args:
        delta: Step size, (N, H, W, E), float32.
        b: Summands, (N, H, W, E), float32.
        A: Decay rate of each channel, (E,), float32.

    Returns:
        h, (N, H, W, E), float32.

    Raises:
        TypeError: A is not in float32: a Scan's body states the type of its inputs.
    """
    if A.dtype != ir.DataType.FLOAT:
        raise TypeError(f'the scan in ONNX: A must be in float32, got {A.dtype}')
    return _scan_rows_and_columns(delta, b, A)


@script()
def _scan_rows_and_columns(delta: FLOAT[...], b: FLOAT[...], A: FLOAT[...]) -> FLOAT[...]:
    first = op.Constant(value_int=0)
    last = op.Constant(value_int=-1)
    columns = op.Constant(value_int=2)

    @graph()
    def column(state: FLOAT[...], a_t: FLOAT[...], b_t: FLOAT[...]):
        new_state = a_t * state + b_t
        before = op.Identity(state)
        return new_state, before

    @graph()
    def row(state: FLOAT[...], decay_of_row: FLOAT[...], end_of_row: FLOAT[...]):
        new_state = decay_of_row * state + end_of_row
        start_of_row = op.Identity(state)
        return new_state, start_of_row

    no_states = op.CastLike(op.ConstantOfShape(op.Shape(op.Gather(b, first, axis=2))), A)
    a = op.Exp(delta * A)
    end, before = op.Scan(
        no_states,
        a,
        b,
        body=column,
        num_scan_inputs=2,
        scan_input_axes=[2, 2],
        scan_output_axes=[2],
    )
    decay = op.Exp(op.CumSum(delta, columns) * A)
    _, start = op.Scan(
        op.Gather(no_states, first, axis=1),
        op.Gather(decay, last, axis=2),
        end,
        body=row,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return a * before + b + decay * op.Unsqueeze(start, op.Constant(value_ints=[2]))


def scan_states(u, delta, A, B):
    """Translates `mmspatialmamba.ops.scan_states`; a sequence without a grid takes a step for each token."""
    rows = op.Constant(value_ints=[1])
    u_acc, delta, B = (op.Unsqueeze(op.CastLike(x, A), rows) for x in (u, delta, B))
    h = scan_grid(delta, op.Mul(op.Mul(delta, B), u_acc), A)
    return op.CastLike(op.Squeeze(h, rows), u)
