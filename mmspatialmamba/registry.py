"""The registries of scope ``mmspatialmamba``, which MMEngine imports to resolve ``type='mmspatialmamba.…'``."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT_MODELS, scope='mmspatialmamba', locations=['mmspatialmamba.models'])

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim wrapper constructor',
    parent=ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmspatialmamba',
    locations=['mmspatialmamba.layer_decay', 'mmspatialmamba.whole_model'],
)
