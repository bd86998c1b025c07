"""The training that `test_interrupted.py` interrupts: a small backbone on random images, the same in every run.

Usage: interrupted_training.py WORK_DIR HOW, where HOW is ``never``, ``epoch``, ``write`` or ``full``.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmspatialmamba import SpatialMamba

EPOCHS = 4


class Images(Dataset):
    """Eight random images and numbers."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {'inputs': torch.randn(3, 48, 32, generator=generator), 'target': torch.randn((), generator=generator)}


class Regressor(BaseModel):
    """A backbone that learns the numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 1, 1)}, out_indices=3, drop_path_rate=0.0)
        self.head = torch.nn.Linear(64, 1)

    def forward(self, inputs, target, mode='loss'):
        (features,) = self.backbone(inputs)
        return {'loss': (self.head(features.mean((2, 3)))[:, 0] - target).square().mean()}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KillInEpoch(Hook):
    """Ends the process in the middle of the third epoch."""

    def after_train_iter(self, runner, batch_idx, **_):
        if runner.epoch == 2 and batch_idx == 1:
            kill()


class FillDisk(Hook):
    """Leaves room for half a checkpoint from the third epoch on."""

    def before_train_epoch(self, runner):
        if runner.epoch == 2:
            size = (Path(runner.work_dir) / 'epoch_1.pth').stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))


def put_half(self, obj, filepath):
    """Writes a file as MMEngine does, but ends the process when half of the third checkpoint is on the disk."""
    if Path(filepath).name == 'epoch_3.pth':
        obj = obj[: len(obj) // 2]
    Path(filepath).write_bytes(obj)
    if Path(filepath).name == 'epoch_3.pth':
        kill()


def main():
    work_dir, how = sys.argv[1:]
    torch.set_num_threads(1)
    if how == 'write':
        LocalBackend.put = put_half
    hooks = {'epoch': [KillInEpoch()], 'full': [FillDisk()]}.get(how, [])
    runner = Runner(
        model=Regressor(),
        work_dir=work_dir,
        resume=True,
        train_dataloader={
            'dataset': Images(),
            'batch_size': 2,
            'collate_fn': {'type': 'default_collate'},
            'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        },
        train_cfg={'by_epoch': True, 'max_epochs': EPOCHS},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 1e-3}},
        param_scheduler={'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 12},
        default_hooks={
            'checkpoint': {'type': 'CheckpointHook', 'interval': 1, 'max_keep_ckpts': 2},
            'logger': {'type': 'LoggerHook', 'interval': 1},
        },
        custom_hooks=hooks,
        randomness={'seed': 0},
    )
    runner.train()


if __name__ == '__main__':
    main()
