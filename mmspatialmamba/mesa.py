"""MESA: training against the predictions of the weights' moving average, as the published classifiers were trained.

Configs name both classes by their full path, which needs no ``custom_imports``. This module needs mmpretrain, which the
rest of the package does not.
Source: sharpness-aware training for free, arXiv 2205.14083, in the form of the published recipe: the cross entropy with
the softmax of the averaged model is added to the loss from a given epoch on.
"""

import logging

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
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
        self._is_teacher_to_come = False

    def expect_teacher(self) -> None:
        """Notes that a teacher comes later, so that training without one is no mistake."""
        self._is_teacher_to_come = True

    def set_teacher(self, teacher: 'MESAImageClassifier') -> None:
        """Adds the MESA term against ``teacher``, which stays outside of this module's parameters and state dict."""
        self._teacher = (teacher.eval(),)

    def loss(self, inputs: torch.Tensor, data_samples: list) -> dict[str, torch.Tensor]:
        """Computes the head's losses and, with a teacher, ``loss_mesa``.

        In training without a teacher, and with none to come, a warning says so, once.

        Args:
            inputs: Image batch, (N, C, H, W), augmented.
            data_samples: One sample for each image.

        Returns:
            The losses by name.
        """
        if self.training and self.mesa_weight and not (self._teacher or self._is_teacher_to_come):
            self._is_teacher_to_come = True  # says it once
            print_log(
                'MESAImageClassifier: trains without MESA, since the run has no MESAHook. A config that inherits '
                'cls_sm_*.py has EMAHook and MESAHook in default_hooks, as ema and mesa. mesa_weight=0 switches MESA '
                'off for good.',
                logger='current',
                level=logging.WARNING,
            )
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

    def before_train(self, runner) -> None:
        """Tells the model that its teacher comes, or warns that it never does.

        Raises:
            TypeError: The model is no `MESAImageClassifier`.
            ValueError: The run has no ``EMAHook``.
        """
        model = self._model(runner)
        averages = self._averages(runner)
        if len(averages) != 1:
            raise ValueError(f'MESAHook: expected one EMAHook among the hooks, found {len(averages)}')
        never = ''
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            never = 'an IterBasedTrainLoop counts no epochs'
        elif runner.max_epochs <= self.begin_epoch:
            never = f'training has {runner.max_epochs} epochs'
        if never:
            print_log(
                f'MESAHook: MESA never begins: begin_epoch is {self.begin_epoch}, and {never}. The published recipe '
                'begins after a quarter of the epochs (default_hooks.mesa.begin_epoch).',
                logger='current',
                level=logging.WARNING,
            )
        model.expect_teacher()

    def before_train_epoch(self, runner) -> None:
        """Sets the teacher at ``begin_epoch``, and after a resume beyond it."""
        if runner.epoch >= self.begin_epoch:
            (average,) = self._averages(runner)
            self._model(runner).set_teacher(average.ema_model.module)

    @staticmethod
    def _model(runner) -> MESAImageClassifier:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, MESAImageClassifier):
            raise TypeError(f'MESAHook: the model must be a MESAImageClassifier, got {type(model).__name__}')
        return model

    @staticmethod
    def _averages(runner) -> list[EMAHook]:
        return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
