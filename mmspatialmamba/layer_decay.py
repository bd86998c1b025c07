"""Layer-wise learning-rate decay: the earlier a layer of the backbone, the smaller its learning rate."""

from collections import defaultdict

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .models import Backbone
from .registry import OPTIM_WRAPPER_CONSTRUCTORS


@ROOT_OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with learning rates that shrink from the heads to the stem of a `Backbone`.

    A parameter of layer k of n (see `Backbone.get_layer_depth`) learns at ``decay_rate ** (n - 1 - k)`` times the
    rate that it has otherwise; what does not belong to the backbone keeps its rate. The backbone may be anywhere in the
    model. Every rule of MMEngine's constructor works as it does there, ``custom_keys`` with ``lr_mult`` among them.

    Example::

        optim_wrapper = dict(
            type='OptimWrapper',
            constructor='mmspatialmamba.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(decay_rate=0.9, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
        )

    Note:
        A scheduler's ``eta_min`` is one value for all layers, to which it would *raise* the rates of early ones: give
        it ``eta_min_ratio`` instead.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its optimizer states ``lr``.
        paramwise_cfg: The rules of MMEngine's constructor, and ``decay_rate``, above 0 and at most 1.

    Raises:
        ValueError: ``decay_rate`` or ``lr`` is missing or has a value that is not allowed, or the model has no
            `Backbone`.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        name = type(self).__name__
        rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f"{name}: paramwise_cfg['decay_rate'] must be a number above 0 and at most 1, got {rate!r}"
            )
        if self.base_lr is None:
            raise ValueError(f'{name}: expected an optimizer with lr, got only {", ".join(self.optimizer_cfg)}')

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Adds a parameter group for each parameter of ``module``, as MMEngine does, then scales their rates."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:  # the whole model: MMEngine calls this method again for each of its parts
            self._scale(params, module)

    def _scale(self, params: list[dict], model: nn.Module) -> None:
        backbones = {
            f'{name}.' if name else '': part for name, part in model.named_modules() if isinstance(part, Backbone)
        }
        if not backbones:
            raise ValueError(
                f'{type(self).__name__}: expected a model with a backbone of mmspatialmamba, found none in '
                f'{type(model).__name__}'
            )
        names = {parameter: name for name, parameter in model.named_parameters()}
        rates = defaultdict(list)
        for group in params:
            name = names[group['params'][0]]
            prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
            if prefix is None:
                continue
            layer, layers = backbones[prefix].get_layer_depth(name, prefix)
            group['lr'] = group.get('lr', self.base_lr) * self.paramwise_cfg['decay_rate'] ** (layers - 1 - layer)
            rates[prefix, layer].append(group['lr'])
        for (prefix, layer), found in sorted(rates.items()):
            lowest, highest = (f'{rate:.3g}' for rate in (min(found), max(found)))
            rate = lowest if lowest == highest else f'{lowest} to {highest}'
            print_log(f'{prefix or "backbone, "}layer {layer}: lr {rate}, {len(found)} parameters', logger='current')
