"""MESA: training against the predictions of the weights' moving average, as the published classifiers were trained.

Configs name this module in ``custom_imports``; it needs mmpretrain, which the rest of the package does not.
Source: sharpness-aware training for free, arXiv 2205.14083, in the form of the published recipe: the cross entropy with
the softmax of the averaged model is added to the loss from a given epoch on.
"""

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from torch import nn


@MODELS.register_module()
class MESAImageClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with the MESA term in its loss once `MESAHook` has given it a teacher.

    Args:
        *args: As those of ``ImageClassifier``.
        mesa_weight: Weight of the term; at least 0.
        **kwargs: As those of ``ImageClassifier``, which refuses unknown ones.

    Raises:
        ValueError: ``mesa_weight`` is negative.
    """

    def __init__(self, *args, mesa_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        if mesa_weight < 0:
            raise ValueError(f'MESAImageClassifier: mesa_weight must be at least 0, got {mesa_weight}')
        self.mesa_weight = mesa_weight
        self._teacher: tuple[nn.Module, ...] = ()

    def set_teacher(self, teacher: 'MESAImageClassifier') -> None:
        """Adds the MESA term against ``teacher``, which stays outside of this module's parameters and state dict."""
        self._teacher = (teacher.eval(),)

    def loss(self, inputs: torch.Tensor, data_samples: list) -> dict[str, torch.Tensor]:
        """Computes the head's losses and, with a teacher, ``loss_mesa``.

        Args:
            inputs: Image batch, (N, C, H, W), augmented.
            data_samples: One sample for each image.

        Returns:
            The losses by name.
        """
        features = self.extract_feat(inputs)
        losses = self.head.loss(features, data_samples)
        for teacher in self._teacher:
            with torch.no_grad():
                target = teacher(inputs).float().softmax(-1)
            losses['loss_mesa'] = self.mesa_weight * F.cross_entropy(self.head(features).float(), target)
        return losses


@HOOKS.register_module()
class MESAHook(Hook):
    """Gives the averaged model of ``EMAHook`` to `MESAImageClassifier` as its teacher.

    Args:
        begin_epoch: First epoch, counted from 0, that has the MESA term.
    """

    def __init__(self, begin_epoch: int):
        self.begin_epoch = begin_epoch

    def before_train_epoch(self, runner) -> None:
        """Sets the teacher at ``begin_epoch``, and after a resume beyond it.

        Raises:
            TypeError: The model is no `MESAImageClassifier`.
            ValueError: The run has no ``EMAHook``.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, MESAImageClassifier):
            raise TypeError(f'MESAHook: the model must be a MESAImageClassifier, got {type(model).__name__}')
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if len(averages) != 1:
            raise ValueError(f'MESAHook: expected one EMAHook in custom_hooks, found {len(averages)}')
        if runner.epoch >= self.begin_epoch:
            model.set_teacher(averages[0].ema_model.module)
