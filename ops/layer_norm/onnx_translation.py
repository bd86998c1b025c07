"""LayerNorm in standard ONNX operators."""

from onnxscript import opset18 as op


def layer_norm(x, weight, bias, eps, dtype):
    """Translates `mmspatialmamba.ops.layer_norm`."""
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    x = op.CastLike(x, parameters[0]) if parameters else x
    if weight is None:
        weight = op.CastLike(op.Constant(value_floats=[1.0] * x.shape[-1]), x)
    out, mean, inverse = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)
    return op.Cast(out, to=dtype), mean, inverse
