"""Spatial-Mamba as a backbone for OpenMMLab: importing this package registers ``SpatialMamba``."""

try:
    from . import ops
except ImportError as error:
    # Not an ImportError: MMEngine turns one that is raised while it resolves a scope into a KeyError without a cause.
    raise RuntimeError(
        'mmspatialmamba.ops cannot be imported. The package is not installed properly: run '
        '"pip install --no-build-isolation -e ." in the checkout (setuptools 64 or later), or install the wheel.'
    ) from error

from . import checkpoint, flops
from .backbone_swap import swap_backbone
from .configs import config_path
from .layer_decay import LayerDecayOptimWrapperConstructor
from .models import SpatialMamba, fuse, unfuse
from .version import __version__

checkpoint.register()
flops.register()

__all__ = [
    'LayerDecayOptimWrapperConstructor', 'SpatialMamba', '__version__', 'config_path', 'fuse', 'ops', 'swap_backbone',
    'unfuse',
]  # fmt: skip
