"""LoRA and other adapters train a few parameters of a frozen backbone, and save nothing else."""

import copy

import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmpretrain.models.peft import LoRAModel
from torch import nn

from mmspatialmamba import SpatialMamba

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}


def lora(base):
    """The backbone with LoRA on the projections of its SSMs, and the weights of ``base``."""
    torch.manual_seed(1)
    model = LoRAModel(
        {'type': 'mmspatialmamba.SpatialMamba', 'arch': SMALL},
        rank=2,
        targets=[{'type': 'in_proj'}, {'type': 'out_proj'}],
    )
    own = {name.replace('.original_layer', ''): value for name, value in model.module.named_parameters()}
    own.update(model.module.named_buffers())
    for name, value in base.state_dict().items():
        own[name].data.copy_(value)
    return model


def test_adapters_alone_bring_back_what_was_trained():
    torch.manual_seed(0)
    base = SpatialMamba(SMALL)
    model = lora(base).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sum(x.square().mean() for x in model(5 * torch.rand(2, 3, 64, 64))).backward()
        optimizer.step()
    saved = copy.deepcopy(model.state_dict())
    assert all('.lora_' in name for name in saved)
    again = lora(base)
    again.load_state_dict(saved)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(model.eval()(x), again.eval()(x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize('trains', [True, False])
def test_statistics_of_what_is_trained_or_averaged_follow_the_batch(trains):
    backbone = SpatialMamba(SMALL).requires_grad_(trains).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)
