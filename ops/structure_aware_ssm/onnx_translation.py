"""The fused core in standard ONNX operators."""

from onnxscript import opset18 as op

from ..scan_states.onnx_translation import scan_grid
from ..state_fusion.onnx_translation import state_fusion


def structure_aware_ssm(u, dt, B, C, dt_weight, dt_bias, A, D, taps):
    """Translates `mmspatialmamba.ops.structure_aware_ssm`."""
    u_acc, dt, B, C = (op.CastLike(x, A) for x in (u, dt, B, C))
    delta = op.Softplus(op.Add(op.MatMul(dt, op.Transpose(dt_weight, perm=[1, 0])), dt_bias))
    h = scan_grid(delta, op.Mul(op.Mul(delta, B), u_acc), A)
    y = op.Add(op.Mul(state_fusion(h, taps), C), op.Mul(u_acc, D))
    return op.CastLike(y, u)
