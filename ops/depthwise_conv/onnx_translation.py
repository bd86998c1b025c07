"""The depthwise convolution in standard ONNX operators."""

from onnxscript import opset18 as op


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
