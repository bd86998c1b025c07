"""What a backbone gets from the base: a second one, small, in everything that looks at backbones."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn
from torch.ao.quantization import quantize_dynamic

import mmspatialmamba
from mmspatialmamba import SpatialMamba, checkpoint_names, inspection, swap_backbone
from mmspatialmamba.checkpoint_names import NameTable, find_table
from mmspatialmamba.models import Backbone
from mmspatialmamba.registry import MODELS

NAMES = NameTable(
    pairs=(
        ('embed', 'stem.conv'),
        ('layers.{i}.units.{j}.mixer', 'stages.{i}.blocks.{j}.ssm'),
        ('layers.{i}.reduce', 'stages.{i}.downsample'),
        ('norm_out{i}', 'out_norms.{i}'),
    ),
    signature=('layers.{i}.units.{j}.mixer.rates', 'stages.{i}.blocks.{j}.ssm.rates'),
    stem='stem.conv.weight',
    classifier_norm='cls.norm',
    classifier_head='cls.fc',
)


class Pixels(nn.Module):
    """Non-overlapping convolution of a map, channels-last on its output."""

    def __init__(self, in_channels, channels, stride, last):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, stride, stride)
        self.last = last

    def forward(self, x):
        return self.conv(x if self.last else x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mixer(nn.Module):
    def __init__(self, channels, ratio):
        super().__init__()
        self.rates = nn.Parameter(torch.ones(ratio * channels))
        self.up = nn.Linear(channels, ratio * channels)
        self.down = nn.Linear(ratio * channels, channels)

    def forward(self, x):
        u, (N, H, W, _) = self.up(x), x.shape
        B = u.new_ones(N, H * W, 1)
        h = mmspatialmamba.ops.scan_states(u.flatten(1, 2), u.new_ones(N, H * W, len(self.rates)), -self.rates, B)
        return x + self.down(h.view(N, H, W, -1))


class Block(nn.Module):
    def __init__(self, channels, ratio):
        super().__init__()
        self.ssm = Mixer(channels, ratio)

    def forward(self, x):
        return self.ssm(x)


class Second(Backbone):
    """A backbone with an architecture key of its own."""

    ARCHITECTURES = {'tiny': {'embed_dims': 8, 'depths': (1, 1, 2, 1), 'ratio': 2}}  # noqa: RUF012
    NAMES = NAMES
    CORE_OP = 'scan_states'

    def make_stem(self, in_channels, channels):
        return Pixels(in_channels, channels, 4, last=True)

    def make_block(self, channels, drop_path_rate):
        return Block(channels, self.arch['ratio'])

    def make_downsample(self, channels):
        return Pixels(channels, 2 * channels, 2, last=False)

    def reset_parameters(self):
        nn.init.zeros_(self.stem.conv.bias)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Makes the second backbone one of this package for a test."""
    monkeypatch.setattr(checkpoint_names, 'TABLES', (*checkpoint_names.TABLES, NAMES))
    monkeypatch.setitem(MODELS.module_dict, 'Second', Second)
    monkeypatch.setitem(ROOT_MODELS.module_dict, 'Second', Second)


def test_maps_and_arguments():
    model = Second(out_indices=(-1, 0), in_channels=4).eval()
    assert [tuple(x.shape) for x in model(torch.rand(2, 4, 64, 32))] == [(2, 64, 2, 1), (2, 8, 16, 8)]
    with pytest.raises(TypeError, match=r'Second: unknown argument depth; allowed are arch, in_.* init_cfg\.'):
        Second(depth=3)
    with pytest.raises(ValueError, match=r'Second: arch must have exactly the keys embed_dims, depths and ratio'):
        Second({'embed_dims': 8, 'depths': (1, 1, 1, 1)})
    with pytest.raises(ValueError, match=r'Second: expected an image batch \(N, 4, H, W\), got \(1, 3, 8, 8\)'):
        model(torch.rand(1, 3, 8, 8))


def test_an_argument_that_a_subclass_adds_is_named():
    class Third(Second):
        def __init__(self, arch='tiny', *, gate=False, **arguments):
            super().__init__(arch, **arguments)

    Third(gate=True, norm_eval=True)
    with pytest.raises(TypeError, match=r'Third: unknown argument gates; allowed are arch, gate, in_channels'):
        Third(gates=True)


def test_published_names_load_and_are_known():
    model = Second()
    state = {NAMES.to_official(name): torch.randn_like(value) for name, value in model.state_dict().items()}
    assert 'layers.2.units.1.mixer.rates' in state
    assert find_table(state) is NAMES
    outer = nn.ModuleDict({'backbone': model})
    outer.load_state_dict({f'backbone.{name}': value for name, value in state.items()})
    assert torch.equal(model.stages[2].blocks[1].ssm.rates, state['layers.2.units.1.mixer.rates'])


def test_weights_of_one_backbone_do_not_half_load_into_another():
    own = SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 2, 1)})
    assert own.state_dict().keys() & Second().state_dict().keys()  # the output norms, of the same shapes
    official = {NAMES.to_official(name): value for name, value in Second().state_dict().items()}
    with pytest.raises(
        RuntimeError,
        match='SpatialMamba: the state dict holds another backbone of mmspatialmamba',
    ):
        own.load_state_dict(official, strict=False)


def test_layer_decay():
    model = nn.ModuleDict({'backbone': Second(), 'head': nn.Linear(2, 2)})
    wrapper = build_optim_wrapper(
        model,
        {
            'type': 'OptimWrapper',
            'constructor': 'LayerDecayOptimWrapperConstructor',
            'optimizer': {'type': 'SGD', 'lr': 1.0},
            'paramwise_cfg': {'decay_rate': 0.5},
        },
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[group['params'][0]]: group['lr'] for group in wrapper.optimizer.param_groups}
    assert rates['backbone.stem.conv.weight'] == 0.5**6
    assert rates['backbone.stages.2.blocks.1.ssm.rates'] == 0.5**2
    assert rates['backbone.out_norms.3.weight'] == rates['head.weight'] == 1.0


def test_swap():
    cfg = Config(
        {
            'default_scope': 'mmdet',
            'model': {
                'type': 'RetinaNet',
                'backbone': {'type': 'mmdet.ResNet', 'depth': 18, 'init_cfg': None},
                'neck': {'type': 'FPN', 'in_channels': [64, 128, 256, 512], 'out_channels': 8, 'start_level': 1},
                'bbox_head': {'type': 'RetinaHead', 'in_channels': 8, 'num_classes': 2},
            },
        }
    )
    swapped = swap_backbone(cfg, backbone='Second').model
    assert swapped.backbone.type == 'mmspatialmamba.Second'
    assert swapped.backbone.out_indices == (1, 2, 3)
    assert swapped.neck.in_channels == [16, 32, 64]
    assert swap_backbone(cfg).model.backbone.type == 'mmspatialmamba.SpatialMamba'
    with pytest.raises(ValueError, match=r"backbone must be one of SpatialMamba, .*Second, got 'ResNet'"):
        swap_backbone(cfg, backbone='ResNet')


def test_inspection(monkeypatch):
    class Record(tuple):
        def __new__(cls, *tensors):
            return super().__new__(cls, tensors)

    monkeypatch.setitem(inspection.RECORDS, 'scan_states', Record)
    model = Second().eval()
    assert inspection.last_blocks(model)[2] == (2, 1)
    seen = []
    model.stages[2].blocks[1].ssm.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    records = inspection.record_ssm(model, torch.rand(1, 3, 64, 32), [(2, 1)])
    *_, h = records[2, 1]
    assert torch.equal(h.view_as(seen[0]), seen[0])


def test_freezing():
    model = Second(frozen_stages=2).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    begins = ('stem.', 'stages.0.', 'stages.1.', 'out_norms.0.', 'out_norms.1.')
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(begins)}


@pytest.mark.parametrize('cls', [Second, SpatialMamba])
def test_a_state_dict_may_hold_more_than_tensors(cls, tmp_path):
    arch = {**Second.ARCHITECTURES['tiny']} if cls is Second else {'embed_dims': 8, 'depths': (1, 1, 2, 1)}
    models = [quantize_dynamic(cls(arch).eval(), {nn.Linear}) for _ in range(2)]
    state, x = models[0].state_dict(), torch.rand(1, 3, 64, 32)
    assert any(isinstance(value, torch.dtype) for value in state.values())
    models[1].load_state_dict(state)
    for one, other in zip(*(model(x) for model in models), strict=True):
        assert torch.equal(one, other)
