"""MESA: the loss against the averaged model's softmax, and the hook that provides that model."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision_setup  # noqa: F401, before mmpretrain
from mmengine.hooks import EMAHook
from mmengine.registry import init_default_scope
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmspatialmamba import mesa
from mmspatialmamba.mesa import MESAHook, MESAImageClassifier


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


def classifier(**arguments):
    torch.manual_seed(0)
    config = {
        'type': 'MESAImageClassifier',
        'mesa_weight': 1.5,
        'backbone': {
            'type': 'SpatialMamba',
            'arch': {'embed_dims': 8, 'depths': (1, 1, 1, 1)},
            'out_indices': (3,),
            'drop_path_rate': 0.0,
        },
        'neck': {'type': 'GlobalAveragePooling'},
        'head': {
            'type': 'LinearClsHead',
            'num_classes': 5,
            'in_channels': 64,
            'loss': {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1, 'mode': 'original'},
        },
        **arguments,
    }
    return MODELS.build(config)


def batch():
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return inputs, [DataSample().set_gt_label(label) for label in (1, 3)]


def test_loss_is_that_of_the_classifier_until_there_is_a_teacher():
    assert set(classifier().loss(*batch())) == {'loss'}


def test_loss_against_a_teacher():
    model = classifier().train()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.head.fc.weight.add_(0.1 * torch.randn_like(teacher.head.fc.weight))
    names = list(model.state_dict())
    model.set_teacher(teacher)
    inputs, samples = batch()
    losses = model.loss(inputs, samples)
    target = teacher.eval()(inputs).softmax(-1)
    expected = 1.5 * -(target * F.log_softmax(model(inputs), -1)).sum(-1).mean()
    assert losses['loss_mesa'].item() == pytest.approx(expected.item(), rel=1e-5)
    losses['loss_mesa'].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.backbone.stem.reduce.conv.weight.grad.abs().sum() > 0
    assert list(model.state_dict()) == names


def runner(epoch, model=None, hooks=None, max_epochs=300):
    if hooks is None:
        hook = EMAHook()
        hook.ema_model = SimpleNamespace(module=classifier())
        hooks = [hook]
    return SimpleNamespace(
        epoch=epoch, model=model or classifier(), hooks=hooks, max_epochs=max_epochs, train_loop=SimpleNamespace()
    )


@pytest.mark.parametrize(('epoch', 'has_teacher'), [(0, False), (74, False), (75, True), (200, True)])
def test_hook_begins_at_its_epoch(epoch, has_teacher):
    run = runner(epoch)
    MESAHook(begin_epoch=75).before_train_epoch(run)
    assert ('loss_mesa' in run.model.loss(*batch())) == has_teacher


@pytest.fixture
def warnings(monkeypatch):
    """The messages that mesa.py logs as warnings."""
    said = []
    monkeypatch.setattr(
        mesa, 'print_log', lambda text, logger, level: said.append(text) if level == logging.WARNING else None
    )
    return said


def test_training_without_the_hook_says_so_once(warnings):
    model = classifier()
    model.eval()
    model.loss(*batch())
    assert warnings == []
    model.train()
    for _ in range(2):
        model.loss(*batch())
    assert len(warnings) == 1
    assert 'trains without MESA, since the run has no MESAHook' in warnings[0]


def test_training_with_the_hook_or_without_mesa_says_nothing(warnings):
    run = runner(0)
    MESAHook(begin_epoch=75).before_train(run)
    run.model.train().loss(*batch())
    classifier(mesa_weight=0).train().loss(*batch())
    assert warnings == []


def test_an_epoch_that_never_comes_is_named(warnings):
    MESAHook(begin_epoch=75).before_train(runner(0, max_epochs=75))
    assert 'begin_epoch is 75, and training has 75 epochs' in warnings.pop()
    iterations = runner(0)
    iterations.train_loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    MESAHook(begin_epoch=75).before_train(iterations)
    assert 'an IterBasedTrainLoop counts no epochs' in warnings.pop()


def test_bad_use():
    with pytest.raises(ValueError, match='expected one EMAHook among the hooks, found 0'):
        MESAHook(begin_epoch=0).before_train(runner(0, hooks=[]))
    with pytest.raises(TypeError, match='the model must be a MESAImageClassifier, got Linear'):
        MESAHook(begin_epoch=0).before_train(runner(0, model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match='mesa_weight must be at least 0, got -1'):
        classifier(mesa_weight=-1)
    assert MESAImageClassifier.__name__ in MODELS
