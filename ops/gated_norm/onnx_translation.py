"""The gated norm in standard ONNX operators."""

from onnxscript import opset18 as op


def gated_norm(y, z, weight, bias, eps):
    """Translates `mmspatialmamba.ops.gated_norm`."""
    norm, _, _ = op.LayerNormalization(op.CastLike(y, weight), weight, bias, axis=-1, epsilon=eps)
    gate = op.CastLike(z, weight)
    return op.CastLike(op.Mul(norm, op.Mul(gate, op.Sigmoid(gate))), y)
