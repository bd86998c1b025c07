"""State space backbones for OpenMMLab: with MMEngine installed, importing this package registers them.

Without MMEngine it offers what PyTorch alone can run: `mmspatialmamba.ops` and ``python -m mmspatialmamba``.
"""

try:
    from . import ops
except ImportError as error:
    # Not an ImportError: MMEngine turns one that is raised while it resolves a scope into a KeyError without a cause.
    raise RuntimeError(
        'mmspatialmamba.ops cannot be imported. The package is not installed properly: run '
        '"pip install --no-build-isolation -e ." in the checkout (setuptools 64 or later), or install the wheel.'
    ) from error

from .configs import config_path
from .version import __version__

WITH_MMENGINE = ('LayerDecayOptimWrapperConstructor', 'SpatialMamba', 'VMamba', 'fuse', 'swap_backbone', 'unfuse')
"""What this package offers beside these, where MMEngine is installed."""

__all__ = ['__version__', 'config_path', 'ops']

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':  # it is there, and lacks something
        raise

    def __getattr__(name: str) -> object:
        if name in WITH_MMENGINE:
            raise ModuleNotFoundError(
                f'mmspatialmamba.{name} needs MMEngine, which is not installed; only mmspatialmamba.ops works without',
                name='mmengine',
            )
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
else:
    from . import checkpoint, flops, whole_model  # noqa: F401
    from .backbone_swap import swap_backbone
    from .layer_decay import LayerDecayOptimWrapperConstructor
    from .models import SpatialMamba, VMamba, fuse, unfuse

    checkpoint.register()
    flops.register()
    __all__ += ['LayerDecayOptimWrapperConstructor', 'SpatialMamba', 'VMamba', 'fuse', 'swap_backbone', 'unfuse']
