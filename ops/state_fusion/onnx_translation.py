"""The state fusion in standard ONNX operators: three depthwise convolutions on edge-padded maps."""

from onnxscript import opset18 as op

from .taps import DILATIONS


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
