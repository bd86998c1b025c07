"""Ops of Spatial-Mamba, registered with PyTorch's dispatcher under ``torch.ops.mmspatialmamba``.

Needs PyTorch only: the package works on its own on a machine that has nothing of OpenMMLab.
"""

from .backends import Backend, backends, load_backends
from .selective_scan import selective_scan
from .state_fusion import fusion_taps, state_fusion
from .structure_aware_ssm import structure_aware_ssm

load_backends()

__all__ = ['Backend', 'backends', 'fusion_taps', 'selective_scan', 'state_fusion', 'structure_aware_ssm']
