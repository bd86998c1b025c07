"""The taps of the state fusion in standard ONNX operators."""

from onnxscript import opset18 as op


def fusion_taps(dwconv_d1, dwconv_d3, dwconv_d5, alpha):
    """Translates `mmspatialmamba.ops.fusion_taps`."""
    centre, neighbours = [], []
    for j, kernel in enumerate((dwconv_d1, dwconv_d3, dwconv_d5)):
        scale = op.Gather(alpha, op.Constant(value_int=j))
        columns = op.Mul(op.Reshape(kernel, op.Constant(value_ints=[kernel.shape[0], 9])), scale)
        rows = op.Transpose(columns, perm=[1, 0])
        centre.append(op.Gather(rows, op.Constant(value_ints=[4])))
        neighbours.append(op.Gather(rows, op.Constant(value_ints=[0, 1, 2, 3, 5, 6, 7, 8])))
    return op.Concat(op.Sum(*centre), *neighbours, axis=0)
