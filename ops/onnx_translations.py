"""The ops in standard ONNX operators, for `torch.onnx.export`; needs ONNX Script. ``import mmspatialmamba.ops`` leaves
this module out.
"""

import torch

from .depthwise_conv.onnx_translation import depthwise_conv
from .fusion_taps.onnx_translation import fusion_taps
from .gated_norm.onnx_translation import gated_norm
from .gelu.onnx_translation import gelu
from .layer_norm.onnx_translation import layer_norm
from .scan_states.onnx_translation import scan_states
from .selective_scan.onnx_translation import selective_scan
from .state_fusion.onnx_translation import state_fusion
from .structure_aware_ssm.onnx_translation import structure_aware_ssm

TRANSLATIONS = {
    torch.ops.mmspatialmamba.depthwise_conv.default: depthwise_conv,
    torch.ops.mmspatialmamba.fusion_taps.default: fusion_taps,
    torch.ops.mmspatialmamba.gated_norm.default: gated_norm,
    torch.ops.mmspatialmamba.gelu.default: gelu,
    torch.ops.mmspatialmamba.layer_norm.default: layer_norm,
    torch.ops.mmspatialmamba.scan_states.default: scan_states,
    torch.ops.mmspatialmamba.selective_scan.orders: selective_scan,
    torch.ops.mmspatialmamba.state_fusion.default: state_fusion,
    torch.ops.mmspatialmamba.structure_aware_ssm.default: structure_aware_ssm,
}
"""For ``custom_translation_table`` of `torch.onnx.export`."""
