"""Optimizers for whole models, from constructors that know parameters called ``weight`` and ``bias`` alone."""

import copy

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .registry import OPTIM_WRAPPER_CONSTRUCTORS


@ROOT_OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class WholeModelOptimWrapperConstructor:
    """Another constructor's optimizer wrapper, with the parameters that it leaves out.

    MMYOLO's constructors collect the modules' ``weight`` and ``bias``. What a state space model has beside these
    (``A_log``, ``D``, ``dt_weight``, …) would keep its initial value without a word; it goes to the first group
    without weight decay. Number and order of the groups, which MMYOLO's hooks go by, stay.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper.
        paramwise_cfg: ``constructor``, the other's type, and what that one takes.

    Raises:
        ValueError: ``constructor`` is missing; when called, the other one made no group without weight decay.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        rules = copy.deepcopy(dict(paramwise_cfg or {}))
        if 'constructor' not in rules:
            raise ValueError(f"{type(self).__name__}: expected paramwise_cfg['constructor'], got only {list(rules)}")
        former = {'type': rules.pop('constructor'), 'optim_wrapper_cfg': optim_wrapper_cfg}
        self.former = ROOT_OPTIM_WRAPPER_CONSTRUCTORS.build(former | {'paramwise_cfg': rules or None})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer wrapper of a model."""
        wrapper = self.former(model)
        groups = wrapper.optimizer.param_groups
        known = {id(parameter) for group in groups for parameter in group['params']}
        undecayed = next((group for group in groups if not group.get('weight_decay')), None)
        if undecayed is None:
            raise ValueError(
                f'{type(self).__name__}: expected {type(self.former).__name__} to make a group without weight decay, '
                f'got weight decays {[group["weight_decay"] for group in groups]}'
            )
        undecayed['params'] += [one for one in model.parameters() if one.requires_grad and id(one) not in known]
        return wrapper
