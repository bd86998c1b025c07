"""The registry of scope ``mmspatialmamba``, which MMEngine imports to resolve ``type='mmspatialmamba.…'``."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT_MODELS, scope='mmspatialmamba', locations=['mmspatialmamba.models'])
