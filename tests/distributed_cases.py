"""What `test_distributed.py` runs in two processes: each case writes what it measured as JSON.

MMEngine's launcher sets a CUDA device, which a CPU build of PyTorch refuses: the process group is started here.
"""

import copy
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel, MMFullyShardedDataParallel, convert_sync_batchnorm
from mmengine.runner import FlexibleRunner
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import DataLoader

from mmspatialmamba import SpatialMamba
from mmspatialmamba.models.block import Block

WORLD_SIZE = 2
ARCH = {'embed_dims': 8, 'depths': (1, 1, 2, 1)}
WRAP_BLOCKS = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})


class Model(BaseModel):
    """A model of MMEngine that is a backbone and a loss: the mean of the squares of its maps."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = SpatialMamba(ARCH, drop_path_rate=0.0, norm_eval=True, **arguments)
        self.double().train()

    def forward(self, inputs, data_samples=None, mode='loss'):
        return {'loss': sum(output.square().mean() for output in self.backbone(inputs))}


def images():
    """The batch of all processes: two images for each."""
    return torch.randn(2 * WORLD_SIZE, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def own_images(rank):
    return images()[2 * rank : 2 * rank + 2]


def difference(one, other):
    """Largest difference between two lists of tensors, each relative to the largest value of its tensor."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if b.abs().max() > 0]
    assert len(pairs) > 100
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def gradients_alone(model):
    """Gradients of one process on the joined batch."""
    model(images())['loss'].backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def ddp(rank, **arguments):
    """Gradients of two processes against one on the joined batch; a second step finds unused parameters."""
    model = Model(**arguments)
    expected = gradients_alone(copy.deepcopy(model))
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):
        model.zero_grad()
        wrapped(own_images(rank), mode='loss')['loss'].backward()
    return difference([p.grad for p in model.parameters() if p.requires_grad], expected)


def fsdp(rank):
    """Parameters after a step of two processes that share them, each block a unit, against one process."""
    model = Model()
    alone = copy.deepcopy(model)
    gradients_alone(alone)
    torch.optim.SGD(alone.parameters(), lr=1.0).step()
    wrapped = MMFullyShardedDataParallel(
        model, auto_wrap_policy=WRAP_BLOCKS, device_id=torch.device('cpu'), use_orig_params=True
    )
    units = [module for module in wrapped.modules() if isinstance(module, FullyShardedDataParallel)]
    wrapped(own_images(rank), mode='loss')['loss'].backward()
    torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        parameters = [p.clone() for p in model.parameters()]
    return {'units': len(units), 'difference': difference(parameters, list(alone.parameters()))}


def flexible_runner(rank):
    """Parameters after two epochs of MMEngine's FlexibleRunner with FSDPStrategy, against a plain loop.

    Both processes read the same batches. No checkpoint is written: PyTorch 2.13 ends in a segmentation fault when it
    gathers the state dict of FSDP on the CPU.
    """
    model = Model()
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for batch in images().split(2) * 2:
        optimizer.zero_grad()
        alone(batch)['loss'].backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        runner = FlexibleRunner(
            model,
            work_dir=folder,
            strategy={
                'type': 'FSDPStrategy',
                'model_wrapper': {
                    'auto_wrap_policy': WRAP_BLOCKS,
                    'device_id': torch.device('cpu'),
                    'use_orig_params': True,
                },
            },
            train_dataloader=DataLoader([{'inputs': image} for image in images()], batch_size=2),
            train_cfg={'by_epoch': True, 'max_epochs': 2},
            optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
            default_hooks={'checkpoint': None},
        )
        runner.train()
    with FullyShardedDataParallel.summon_full_params(runner.model):
        parameters = [p.clone() for p in model.parameters()]
    return difference(parameters, list(alone.parameters()))


def sync_bn(rank):
    """The message of SyncBatchNorm in training on the CPU, which it has no kernel for."""
    model = convert_sync_batchnorm(SpatialMamba(ARCH, drop_path_rate=0.0)).train()
    try:
        model(own_images(rank).float())
    except ValueError as error:
        return str(error)
    return 'trained'


CASES = {
    'ddp': ddp,
    'ddp_frozen': functools.partial(ddp, frozen_stages=1),
    'ddp_some_outputs': functools.partial(ddp, out_indices=(1, 2)),
    'ddp_with_cp': functools.partial(ddp, with_cp=True),
    'fsdp': fsdp,
    'flexible_runner': flexible_runner,
    'sync_bn': sync_bn,
}


def work(rank, store, target):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=WORLD_SIZE)
    names = sys.argv[2:] or CASES
    results = {name: CASES[name](rank) for name in names}
    if rank == 0:
        Path(target).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f'{folder}/store', sys.argv[1]), nprocs=WORLD_SIZE)
