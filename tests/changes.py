"""A small backbone with weights as after training, and what people do to its layers; shared by several tests."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmspatialmamba import SpatialMamba
from mmspatialmamba.models.layers import DepthwiseConv
from mmspatialmamba.models.ssm import GatedNorm

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}


def randomize(module):
    """Gives every parameter and statistic a value of its own, as training does, and float64."""
    generator = torch.Generator().manual_seed(7)
    module.double()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for name, tensor in module.named_buffers():
            if 'running' in name:
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def backbone(**arguments):
    torch.manual_seed(0)
    return randomize(SpatialMamba(SMALL, drop_path_rate=0.0, **arguments)).eval()


def image(batch=2):
    return torch.randn(batch, 3, 40, 56, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def same(outputs, expected):
    return all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def with_computation(model):
    """All modules of a model by name, but containers, which compute nothing."""
    return {
        name: module for name, module in model.named_modules() if not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }


def changed_convolution(channels, activation='none', residual=False, **changes):
    layer = DepthwiseConv(channels, activation=activation, residual=residual)
    for name, value in changes.items():
        setattr(layer, name, value)
    if layer.padding_mode != 'zeros':
        layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, 'weight', 0.5)


LAYERS = {
    'ssm.in_proj with a bias': ('ssm.in_proj', lambda: nn.Linear(8, 32)),
    'ssm.x_proj with a bias': ('ssm.x_proj', lambda: nn.Linear(16, 3)),
    'ssm.out_proj with a bias': ('ssm.out_proj', lambda: nn.Linear(16, 8)),
    'mlp.fc1 without a bias': ('mlp.fc1', lambda: nn.Linear(8, 32, bias=False)),
    'mlp.fc2 without a bias': ('mlp.fc2', lambda: nn.Linear(32, 8, bias=False)),
    'mlp.act tanh': ('mlp.act', lambda: nn.GELU('tanh')),
    'mlp.act of another class': ('mlp.act', nn.SiLU),
    'norm1 eps': ('norm1', lambda: nn.LayerNorm(8, eps=0.5)),
    'norm1 without weights': ('norm1', lambda: nn.LayerNorm(8, elementwise_affine=False)),
    'norm2 without a bias': ('norm2', lambda: nn.LayerNorm(8, bias=False)),
    'norm2 without weights': ('norm2', lambda: nn.LayerNorm(8, elementwise_affine=False)),
    'ssm.norm eps': ('ssm.norm', lambda: GatedNorm(16, eps=0.5)),
    'ssm.norm without weights': ('ssm.norm', lambda: GatedNorm(16, elementwise_affine=False)),
    'ssm.norm without a bias': ('ssm.norm', lambda: GatedNorm(16, bias=False)),
    'cpe1 padding': ('cpe1', lambda: changed_convolution(8, residual=True, padding_mode='replicate')),
    'cpe2 dilation': ('cpe2', lambda: changed_convolution(8, residual=True, dilation=(2, 2), padding=(2, 2))),
    'cpe2 without a bias': ('cpe2', lambda: changed_convolution(8, residual=True, bias=None)),
    'ssm.dwconv padding': ('ssm.dwconv', lambda: changed_convolution(16, 'silu', padding_mode='circular')),
    'ssm.dwconv relu': ('ssm.dwconv', lambda: changed_convolution(16, 'relu')),
    'ssm.dwconv without a bias': ('ssm.dwconv', lambda: changed_convolution(16, 'silu', bias=None)),
    'ssm.dwconv pruned': ('ssm.dwconv', lambda: pruned(changed_convolution(16, 'silu'))),
    'ssm.in_proj pruned': ('ssm.in_proj', lambda: pruned(nn.Linear(8, 32, bias=False))),
    'mlp.fc1 parametrized': ('mlp.fc1', lambda: parametrizations.weight_norm(nn.Linear(8, 32))),
    'mlp.fc2 parametrized': ('mlp.fc2', lambda: parametrizations.orthogonal(nn.Linear(32, 8))),
    'cpe1 parametrized': ('cpe1', lambda: parametrizations.weight_norm(changed_convolution(8, residual=True))),
    'drop_path an identity': ('drop_path', nn.Identity),
}  # fmt: skip


class ClippedNorm(nn.BatchNorm2d):
    """A norm whose own forward does more than its base class says."""

    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


def dilated(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 2, dilation=2, bias=False)


def replicating(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, padding_mode='replicate')


CONVOLUTIONS = {
    'stem convolution that replicates': ('stem.reduce.conv', replicating),
    'stem convolution with dilation': ('stem.expand.conv', dilated),
    'norm with a forward of its own': ('stem.reduce.norm', lambda norm: ClippedNorm(norm.num_features)),
    'norm without weights': ('stem.expand.norm', lambda norm: nn.BatchNorm2d(norm.num_features, affine=False)),
    'norm of another eps': ('stages.0.downsample.project.norm', lambda norm: nn.BatchNorm2d(norm.num_features, 0.5)),
    'no norm': ('stages.0.downsample.project.norm', lambda norm: nn.Identity()),
    '1x1 convolution in groups': ('stem.project.conv', lambda conv: nn.Conv2d(32, 8, 1, groups=2, bias=False)),
    '1x1 convolution of stride': ('stages.1.downsample.expand', lambda conv: nn.Conv2d(16, 128, 1, 2)),
    'wide depthwise without a bias': ('stages.0.downsample.dwconv', lambda conv: setattr(conv, 'bias', None) or conv),
}


class Adapter(nn.Module):
    """A low-rank adapter as its libraries write it: it passes the weight of the layer inside for its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, *x):
        return 2 * self.base(*x)


class Quantized(torch.Tensor):
    """A weight of whole numbers and a scale, as quantization libraries write it: linear layers know it, nobody else."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f'Quantized has no {func}')
