"""What a fused branch reads and writes, counted op by op: never more than the layers it stands for."""

from math import prod

import pytest
import torch
import torch.nn as nn
from mmspatialmamba.ops.downsample.reference import downsample_backward_reference, downsample_reference
from mmspatialmamba.ops.mlp.reference import mlp_backward_reference, mlp_reference
from mmspatialmamba.ops.ssm_layer.reference import ssm_layer_backward_reference, ssm_layer_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmspatialmamba.models.block import Block
from mmspatialmamba.models.fused import FusedBlock, fuse
from mmspatialmamba.models.layers import Downsample

OPS = torch.ops.mmspatialmamba
CHANNELS, GRID, BATCH = 128, (24, 32), 2
FORMATS = ('float32', 'bfloat16', 'autocast')
"""Model and map in float32 or bfloat16, or in float32 under autocast in bfloat16."""


class Traffic(TorchDispatchMode):
    """Sums the bytes of what each op takes and returns; views take nothing.

    An op of this package counts by its schema: its C++ and Triton kernels read each input and write each output once.
    One that is named in ``opened`` counts by what its reference calls.
    """

    def __init__(self, opened=None):
        super().__init__()
        self.opened = opened or {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.opened:
            with self:
                return self.opened[func](*args)
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if not (func.is_view or func in (torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format)):
            self.bytes += sum(_bytes(tensor) for tensor in tensors)
        return result


def _bytes(tensor):
    """Bytes of a tensor's values; one that is expanded counts once."""
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def traffic(block, branch, form, opened=None):
    """Bytes for each value of the map that a branch moves, forward and backward."""
    dtype = torch.bfloat16 if form == 'bfloat16' else torch.float32
    block.to(dtype).train()
    shape = (BATCH, *GRID, CHANNELS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with Traffic(opened) as forward, torch.autocast('cpu', torch.bfloat16, enabled=form == 'autocast'):
        out = branch(block, x)
    with Traffic(opened) as backward:
        out.backward(torch.ones_like(out))
    return forward.bytes / x.numel(), backward.bytes / x.numel()


LAYERS = {
    'mlp': lambda block, x: x + block.drop_path(block.mlp(block.norm2(x))),
    'ssm_layer': lambda block, x: x + block.drop_path(block.ssm(block.norm1(x))),
}
FUSED = {'mlp': FusedBlock.compute_mlp, 'ssm_layer': FusedBlock.compute_ssm}
SSM_LAYER = {OPS.ssm_layer.default: ssm_layer_reference, OPS.ssm_layer_backward.default: ssm_layer_backward_reference}
REFERENCES = {
    'mlp': {OPS.mlp.default: mlp_reference, OPS.mlp_backward.default: mlp_backward_reference},
    'ssm_layer': SSM_LAYER,
}
KERNELS = {'mlp': {}, 'ssm_layer': SSM_LAYER}
"""`mlp` has a C++ kernel that reads and writes each tensor once; `ssm_layer` is made of other ops everywhere."""

SLACK = 0.05
"""Bytes for each value that two sums over tokens may differ by."""


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.2])
@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('serve', ['reference', 'kernel'])
@pytest.mark.parametrize('branch', LAYERS)
def test_a_fused_branch_moves_no_more_than_its_layers(branch, serve, form, drop_path_rate):
    layers = traffic(Block(CHANNELS, drop_path_rate), LAYERS[branch], form)
    opened = REFERENCES[branch] if serve == 'reference' else KERNELS[branch]
    fused = traffic(fuse(Block(CHANNELS, drop_path_rate)), FUSED[branch], form, opened)
    for one, other in zip(fused, layers, strict=True):
        assert one <= other + SLACK, (fused, layers)


def test_a_pass_more_is_noticed():
    def wasteful(*arguments):
        out, kept = mlp_reference(*arguments)
        return out + 0, kept

    layers = traffic(Block(CHANNELS, 0.0), LAYERS['mlp'], 'float32')
    opened = {**REFERENCES['mlp'], OPS.mlp.default: wasteful}
    fused = traffic(fuse(Block(CHANNELS, 0.0)), FUSED['mlp'], 'float32', opened)
    assert fused[0] > layers[0] + SLACK


DOWNSAMPLE = {
    OPS.downsample.default: downsample_reference,
    OPS.downsample_backward.default: downsample_backward_reference,
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_convolutions_of_a_downsample_move_no_more_than_the_layers(dtype):
    """On other devices than the CPU, which has a part of the hidden channels at a time, in its cache."""
    found = []
    for model in (Downsample(CHANNELS), fuse(nn.Sequential(Block(8, 0.0), Downsample(CHANNELS)))[1]):
        model.to('meta', dtype).project = nn.Identity()
        x = torch.empty((BATCH, 400, 640, CHANNELS), dtype=dtype, device='meta', requires_grad=True)
        with Traffic(DOWNSAMPLE) as forward:
            out = model(x)
        with Traffic(DOWNSAMPLE) as backward:
            out.backward(torch.empty_like(out))
        found.append((forward.bytes / x.numel(), backward.bytes / x.numel()))
    layers, fused = found
    for one, other in zip(fused, layers, strict=True):
        assert one <= other + SLACK, (fused, layers)
