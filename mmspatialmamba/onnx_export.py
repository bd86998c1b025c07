"""Spatial-Mamba in standard ONNX operators, for `torch.onnx.export`; needs ``requirements/export.txt``.

The scan is blocked by the rows of the grid: one ONNX Scan walks over the columns of all rows at once, a second one over
the rows to carry their last states, so that an image of H x W tokens takes W + H steps instead of H·W. The decay from
the start of a row is the exponential of a running sum, at most 1, and never divided by. The fusion is three depthwise
convolutions on edge-padded maps. Nothing depends on the exported size: batch, height and width stay dynamic.

``import mmspatialmamba`` leaves this module out.
"""

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

from .ops.state_fusion import DILATIONS

MIN_SIDE = 33
"""Smallest height and width of the example image: below it the last map is a single row or column, which
`torch.export` would take for a constant. The exported file accepts any size."""


@script()
def scan_grid(delta: FLOAT[...], b: FLOAT[...], A: FLOAT[...]) -> FLOAT[...]:
    """Computes ``h_t = exp(delta_t A) h_{t-1} + b_t``, ``h_0 = 0``, over the tokens of a grid in row-major order.

    Args:
        delta: Step size, (N, H, W, E).
        b: Summands, (N, H, W, E).
        A: Decay rate of each channel, (E,).

    Returns:
        h, (N, H, W, E).
    """
    first = op.Constant(value_int=0)
    last = op.Constant(value_int=-1)
    columns = op.Constant(value_int=2)

    @graph()
    def column(state, a_t, b_t):
        new_state = a_t * state + b_t
        output = op.Identity(new_state)
        return new_state, output

    @graph()
    def row(state, decay_of_row, end_of_row):
        new_state = decay_of_row * state + end_of_row
        start_of_row = op.Identity(state)
        return new_state, start_of_row

    no_states = op.CastLike(op.ConstantOfShape(op.Shape(op.Gather(b, first, axis=2))), A)
    end, within = op.Scan(
        no_states,
        op.Exp(delta * A),
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
    return within + decay * op.Unsqueeze(start, op.Constant(value_ints=[2]))


def selective_scan(u, delta, A, B):
    """Translates `mmspatialmamba.ops.selective_scan`; a sequence without a grid takes a step for each token."""
    rows = op.Constant(value_ints=[1])
    u_acc, delta, B = (op.Unsqueeze(op.CastLike(x, A), rows) for x in (u, delta, B))
    h = scan_grid(delta, op.Mul(op.Mul(delta, B), u_acc), A)
    return op.CastLike(op.Squeeze(h, rows), u)


def state_fusion(h, taps):
    """Translates `mmspatialmamba.ops.state_fusion`; three depthwise convolutions, the centre tap in the first."""
    channels = taps.shape[1]
    centre = op.Slice(taps, [0], [1])
    x = op.Transpose(op.CastLike(h, taps), perm=[0, 3, 1, 2])
    g = None
    for index, dilation in enumerate(DILATIONS):
        before, after = (op.Slice(taps, [first], [first + 4]) for first in (1 + 8 * index, 5 + 8 * index))
        middle = op.Sub(centre, centre) if index else centre
        kernel = op.Transpose(op.Concat(before, middle, after, axis=0), perm=[1, 0])
        kernel = op.Reshape(kernel, [channels, 1, 3, 3])
        padded = op.Pad(x, [0, 0, dilation, dilation] * 2, mode='edge')
        term = op.Conv(padded, kernel, dilations=[dilation, dilation], group=channels)
        g = op.Add(g, term) if index else term
    return op.CastLike(op.Transpose(g, perm=[0, 2, 3, 1]), h)


def structure_aware_ssm(u, dt, B, C, dt_weight, dt_bias, A, D, taps):
    """Translates `mmspatialmamba.ops.structure_aware_ssm`."""
    u_acc, dt, B, C = (op.CastLike(x, A) for x in (u, dt, B, C))
    delta = op.Softplus(op.Add(op.MatMul(dt, op.Transpose(dt_weight, perm=[1, 0])), dt_bias))
    h = scan_grid(delta, op.Mul(op.Mul(delta, B), u_acc), A)
    y = op.Add(op.Mul(state_fusion(h, taps), C), op.Mul(u_acc, D))
    return op.CastLike(y, u)


def depthwise_conv(x, weight, bias, stride, activation, relu_input, residual):
    """Translates `mmspatialmamba.ops.depthwise_conv`."""
    x_acc = op.CastLike(x, weight)
    if relu_input:
        x_acc = op.Relu(x_acc)
    image = op.Transpose(x_acc, perm=[0, 3, 1, 2])
    y = op.Conv(image, weight, bias, pads=[1, 1, 1, 1], strides=[stride, stride], group=weight.shape[0])
    y = op.Transpose(y, perm=[0, 2, 3, 1])
    if activation == 'silu':
        y = op.Mul(y, op.Sigmoid(y))
    elif activation == 'relu':
        y = op.Relu(y)
    if residual:
        y = op.Add(x_acc, y)
    return op.CastLike(y, x)


def gated_norm(y, z, weight, bias, eps):
    """Translates `mmspatialmamba.ops.gated_norm`."""
    norm, _, _ = op.LayerNormalization(op.CastLike(y, weight), weight, bias, axis=-1, epsilon=eps)
    gate = op.CastLike(z, weight)
    return op.CastLike(op.Mul(norm, op.Mul(gate, op.Sigmoid(gate))), y)


def adaptive_avg_pool2d(x, output_size):
    """Translates `torch.nn.functional.adaptive_avg_pool2d` of a map of any size, as products with two matrices.

    PyTorch 2.13's own translation keeps the window sizes of the exported map, and is silently wrong at every other.
    """
    rows, columns = (_averaging_matrix(x, axis, size) for axis, size in zip((2, 3), output_size, strict=True))
    return op.MatMul(op.MatMul(rows, x), op.Transpose(columns, perm=[1, 0]))


def _averaging_matrix(x, axis: int, size: int):
    """Returns the matrix (size, length) that averages ``x`` over the ``size`` windows of an axis of some length."""
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    window = op.Constant(value_ints=list(range(size)))
    start = op.Unsqueeze(op.Div(op.Mul(window, length), size), [1])
    end = op.Unsqueeze(op.Div(op.Add(op.Mul(op.Add(window, 1), length), size - 1), size), [1])
    position = op.Range(0, length, 1)
    inside = op.And(op.GreaterOrEqual(position, start), op.Less(position, end))
    return op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(end, start), x))


TRANSLATIONS = {
    torch.ops.mmspatialmamba.depthwise_conv.default: depthwise_conv,
    torch.ops.mmspatialmamba.gated_norm.default: gated_norm,
    torch.ops.mmspatialmamba.selective_scan.default: selective_scan,
    torch.ops.mmspatialmamba.state_fusion.default: state_fusion,
    torch.ops.mmspatialmamba.structure_aware_ssm.default: structure_aware_ssm,
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
}
"""For ``custom_translation_table`` of `torch.onnx.export`."""


def export_onnx(model: torch.nn.Module, images: torch.Tensor, output_names: list[str]) -> torch.onnx.ONNXProgram:
    """Exports a model with dynamic batch, height and width.

    Args:
        model: Maps an image batch to a tensor or a tuple of tensors; in evaluation mode.
        images: Example batch, (N, C, H, W), N at least 2, H and W at least ``MIN_SIDE``.
        output_names: Name of each output.

    Returns:
        The program; its ``save(path)`` writes the file.

    Raises:
        ValueError: The example is too small, or the model is in training mode.
    """
    if images.ndim != 4 or len(images) < 2 or min(images.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f'export_onnx: images must be (N, C, H, W) with N of at least 2 and sides of at least {MIN_SIDE}, got '
            f'{tuple(images.shape)}'
        )
    if model.training:
        raise ValueError('export_onnx: model must be in evaluation mode, got one in training mode')
    return torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},),
        custom_translation_table=TRANSLATIONS,
        input_names=['image'],
        output_names=output_names,
    )
