"""Ops of Spatial-Mamba and VMamba, registered with PyTorch's dispatcher under ``torch.ops.mmspatialmamba``.

Needs PyTorch only: a process that loads an exported program imports this, without MMEngine or a toolbox.
"""

from . import flop_counter
from .backends import Backend, backends, load_backends
from .depthwise_conv import depthwise_conv
from .downsample import downsample
from .fusion_taps import fusion_taps
from .gated_norm import gated_norm
from .gelu import gelu
from .layer_norm import layer_norm
from .library import define_retired
from .mlp import mlp
from .scan_states import scan_states
from .selective_scan import selective_scan
from .ssm_layer import ssm_layer
from .state_fusion import state_fusion
from .structure_aware_ssm import structure_aware_ssm

load_backends()
define_retired()
flop_counter.register()

__all__ = [
    'Backend', 'backends', 'depthwise_conv', 'downsample', 'fusion_taps', 'gated_norm', 'gelu', 'layer_norm', 'mlp',
    'scan_states', 'selective_scan', 'ssm_layer', 'state_fusion', 'structure_aware_ssm',
]  # fmt: skip
