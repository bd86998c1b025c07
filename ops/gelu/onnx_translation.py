"""GELU in standard ONNX operators."""

from onnxscript import opset18 as op


def gelu(x):
    """Translates `mmspatialmamba.ops.gelu`."""
    half, root = (op.CastLike(op.Constant(value_float=value), x) for value in (0.5, 2**0.5))
    return x * half * (op.Erf(x / root) + op.CastLike(op.Constant(value_float=1.0), x))
