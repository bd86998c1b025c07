"""Looks into models: loads one from its config, prepares an image for it, and records what its SSMs compute.

For analysis tools and notebooks; training and evaluation do not need it, and ``import mmspatialmamba`` leaves it out.
"""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.structures import BaseDataElement
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint import get_weights
from .models import Backbone
from .models.fused import FusedBlock
from .ops import scan_states, state_fusion
from .ops.selective_scan.orders import split, visited

PICTURE_FORMATS = ('.png', '.jpg', '.webp', '.svg', '.pdf')


def read_config(name: str) -> Config:
    """Reads a config file, or with a name such as 'mmdet::swin/FILE.py' one that comes with a toolbox.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The config has no model with a backbone.
    """
    if '::' in name:
        config = get_config(name)
    elif Path(name).is_file():
        config = Config.fromfile(name)
    else:
        raise FileNotFoundError(f'{name}: expected a config file, found no such file')
    model = config.get('model')
    if not isinstance(model, dict) or 'backbone' not in model:
        found = model.get('type', 'a model without type') if isinstance(model, dict) else 'no model'
        raise ValueError(f'{name}: expected a config with a model that has a backbone, found {found}')
    return config


def build_model(config: Config, checkpoint: str | None = None, seed: int = 0) -> nn.Module:
    """Builds the model of a config in evaluation mode on the CPU, with random weights or those of a checkpoint.

    Whatever weights the config itself names are left out: without ``checkpoint`` the model is as before any training.
    With one, ``model.dataset_meta`` holds the names of the classes, if the checkpoint does. The norms of a
    `Backbone`'s outputs, which a classifier's file lacks, keep their initial values then, as when a detector is
    trained from it.

    Args:
        config: Config of mmdet, mmseg or mmpretrain.
        checkpoint: Checkpoint file, its address, the name of a published model, or None.
        seed: Seed of the random weights.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        mmspatialmamba.checkpoint.CheckpointError: The checkpoint cannot be read.
        ValueError: The checkpoint is not one of this model: not all tensors of the backbone are in it (but norms of
            outputs), or shapes differ.
    """
    model_config = _without_pretrained(config.model)
    model_config.setdefault('data_preprocessor', config.get('data_preprocessor'))  # mmpretrain's stands beside it
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')  # init_weights logs a line for each parameter
    try:
        with torch.random.fork_rng(devices=()), DefaultScope.overwrite_default_scope(config.get('default_scope')):
            torch.manual_seed(seed)
            model = revert_sync_batchnorm(MODELS.build(model_config))
            if checkpoint is None:
                model.init_weights()
            else:
                _load(model, checkpoint)
    finally:
        logger.setLevel(level)
    return model.eval()


def _without_pretrained(value: object) -> object:
    """Returns a copy of a config's value in which nothing names pretrained weights."""
    if isinstance(value, dict):
        return ConfigDict(
            {
                key: None
                if key == 'pretrained' or (key == 'init_cfg' and 'Pretrained' in str(inner))
                else _without_pretrained(inner)
                for key, inner in value.items()
            }
        )
    if isinstance(value, (list, tuple)):
        return type(value)(_without_pretrained(inner) for inner in value)
    return value


def _load(model: nn.Module, checkpoint: str) -> None:
    content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    weights = get_weights(content)
    expected = f'{checkpoint}: expected the weights of this model'
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f'{expected}, found {" ".join(str(error).split())}') from error
    missing = [name for name in missing if name.startswith('backbone.') and '.out_norms.' not in name]
    if missing:
        names = ', '.join(missing[:3]) + (', …' if len(missing) > 3 else '')
        raise ValueError(f'{expected}, found none for {len(missing)} tensors of its backbone: {names}')
    model.dataset_meta = content.get('meta', {}).get('dataset_meta', {})


def picture_path(value: str) -> Path:
    """Returns the path of a picture to write, for ``argparse``: its suffix says the format.

    Raises:
        argparse.ArgumentTypeError: The format is not among `PICTURE_FORMATS`.
    """
    path = Path(value)
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise ArgumentTypeError(f'expected a file name that ends in {", ".join(PICTURE_FORMATS)}, got {value!r}')
    return path


def crop_image(path: Path, height: int, width: int) -> np.ndarray:
    """Reads an image, scales it to cover the given size and crops its centre.

    Args:
        path: Image file.
        height: Height of the result, in pixels.
        width: Width of the result, in pixels.

    Returns:
        Image, (height, width, 3), uint8, BGR.

    Raises:
        ValueError: The file is no image.
    """
    image = _read_image(path)
    scale = max(height / image.shape[0], width / image.shape[1])
    rows, columns = max(height, round(scale * image.shape[0])), max(width, round(scale * image.shape[1]))
    image = mmcv.imresize(image, (columns, rows))
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[top : top + height, left : left + width]


def _read_image(path: Path) -> np.ndarray:
    image = mmcv.imread(str(path)) if path.is_file() else None
    if image is None:
        raise ValueError(f'{path}: expected an image file, found {"no image" if path.exists() else "no such file"}')
    return image


def normalize(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """Returns the image batch (1, 3, H, W) that the model's own data preprocessor makes of a uint8 BGR image."""
    inputs = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return model.data_preprocessor({'inputs': [inputs], 'data_samples': None}, False)['inputs']


@dataclass(frozen=True)
class Sample:
    """An image as a config's test pipeline and the model's data preprocessor prepare it.

    Attributes:
        image: Image after the pipeline, (H, W, 3), uint8, RGB.
        inputs: Normalized and perhaps padded image batch, (1, 3, H', W').
        data_samples: What the model's ``predict`` wants beside the inputs.
    """

    image: np.ndarray
    inputs: torch.Tensor
    data_samples: list[BaseDataElement]


def prepare(config: Config, model: nn.Module, path: Path) -> Sample:
    """Prepares an image as testing does, without annotations.

    Raises:
        ValueError: The file is no image, or the config has no test pipeline.
    """
    _read_image(path)
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    if 'pipeline' not in dataset:
        raise ValueError(f'{config.filename}: expected a config with test_dataloader.dataset.pipeline, found none')
    steps = [step for step in dataset.pipeline if 'Annotations' not in str(step.type)]
    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        data = Compose(steps)({'img_path': str(path), 'img_id': 0})
    image = data['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    return Sample(image, batch['inputs'], batch['data_samples'])


@dataclass(frozen=True)
class SSMRecord:
    """One call of `mmspatialmamba.ops.structure_aware_ssm`: its arguments, its result y, and what lies between.

    The names and shapes are those of the op's docstring.
    """

    u: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    dt_weight: torch.Tensor
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    taps: torch.Tensor
    y: torch.Tensor

    @cached_property
    def delta(self) -> torch.Tensor:
        """Step size Δ, (N, H, W, E)."""
        pre = nn.functional.linear(self.dt, self.dt_weight, self.dt_bias)
        return torch.logaddexp(pre, torch.zeros_like(pre))

    @cached_property
    def h(self) -> torch.Tensor:
        """State before fusion, (N, H, W, E)."""
        u, delta, B = (x.flatten(1, 2) for x in (self.u, self.delta, self.B))
        return scan_states(u, delta, self.A, B).unflatten(1, self.u.shape[1:3])

    @cached_property
    def g(self) -> torch.Tensor:
        """State after fusion, (N, H, W, E)."""
        return state_fusion(self.h, self.taps)

    def maps(self) -> dict[str, torch.Tensor]:
        """Returns what there is to see by its title, each (N, H, W, E)."""
        return {
            'input u': self.u,
            'step size Δ': self.delta,
            'state before fusion h': self.h,
            'state after fusion g': self.g,
            'observation y': self.y,
        }


@dataclass(frozen=True)
class ScanRecord:
    """One call of `mmspatialmamba.ops.selective_scan`: its arguments, its result y, and what lies between.

    The names and shapes are those of the op's docstring; ``orders`` are the integers that its dispatcher takes.
    """

    u: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    dt_weight: torch.Tensor
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    orders: tuple[int, ...]
    y: torch.Tensor

    @cached_property
    def visits(self) -> list[torch.Tensor]:
        """Positions of the row-major map in the sequence of each order, (HW,), int64."""
        positions = self.u.shape[1] * self.u.shape[2]
        return [visited(order, positions, self.u.device) for order in split(self.orders)]

    @cached_property
    def delta(self) -> torch.Tensor:
        """Step size Δ of each order, (N, H, W, K, E)."""
        pre = torch.einsum('nhwkr,ker->nhwke', self.dt, self.dt_weight) + self.dt_bias
        return torch.logaddexp(pre, torch.zeros_like(pre))

    @cached_property
    def h(self) -> torch.Tensor:
        """States of each order, (N, H, W, K, E, S)."""
        u, delta, B = (x.flatten(1, 2) for x in (self.u, self.delta, self.B))
        h = u.new_empty(*delta.shape, self.A.shape[-1])
        for k, at in enumerate(self.visits):
            for s in range(h.shape[-1]):
                h[:, at, k, :, s] = scan_states(u[:, at], delta[:, at, k], self.A[k, :, s], B[:, at, k, s, None])
        return h.unflatten(1, self.u.shape[1:3])

    def maps(self) -> dict[str, torch.Tensor]:
        """Returns what there is to see by its title, each (N, H, W, E); of each order the observation of its states."""
        observed = (self.h * self.C[..., None, :]).sum(-1)
        orders = {f'C·h of order {k}': observed[..., k, :] for k in range(observed.shape[3])}
        return {'input u': self.u, 'mean step size Δ': self.delta.mean(3), **orders, 'observation y': self.y}


RECORDS = {'structure_aware_ssm': SSMRecord, 'selective_scan': ScanRecord}
"""What is recorded of a call, by the op that is called: a class whose fields are the op's arguments and result."""


class _Recorder(TorchFunctionMode):
    """Records the calls of an op whose turn is in ``turns``, counted from 0, while it is active."""

    def __init__(self, op: str, turns: set[int]):
        super().__init__()
        self.op = getattr(torch.ops.mmspatialmamba, op)
        self.record = RECORDS[op]
        self.turns = turns
        self.count = 0
        self.records: dict[int, SSMRecord | ScanRecord] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, 'overloadpacket', func) is self.op:
            if self.count in self.turns:
                fields = (x.detach() if isinstance(x, torch.Tensor) else x for x in (*args, result))
                self.records[self.count] = self.record(*fields)
            self.count += 1
        return result


def last_blocks(backbone: Backbone) -> list[tuple[int, int]]:
    """Returns stage and block, counted from 0, of the last block of each stage that the backbone has."""
    return [(index, len(stage.blocks) - 1) for index, stage in enumerate(backbone.stages)]


@torch.no_grad()
def record_ssm(
    backbone: nn.Module, inputs: torch.Tensor, blocks: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], SSMRecord | ScanRecord]:
    """Runs the backbone once and returns what the SSMs of the named blocks computed.

    Args:
        backbone: A `Backbone`.
        inputs: Image batch, as its ``forward`` takes it.
        blocks: Stage and block of each SSM, counted from 0.

    Raises:
        ValueError: The backbone is another one, or has no such block.
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(f'expected a backbone of mmspatialmamba, found {type(backbone).__name__}')
    if any(isinstance(module, FusedBlock) for module in backbone.modules()):
        raise ValueError('expected a layered backbone, found a fused one: call mmspatialmamba.unfuse(backbone) first')
    places = [(index, block) for index, stage in enumerate(backbone.stages) for block in range(len(stage.blocks))]
    turns = {place: turn for turn, place in enumerate(places)}
    for block in blocks:
        if tuple(block) not in turns:
            depths = ', '.join(str(len(stage.blocks)) for stage in backbone.stages)
            raise ValueError(f'expected a stage and a block among {depths} blocks of the stages, found {block}')
    with _Recorder(backbone.CORE_OP, {turns[tuple(block)] for block in blocks}) as recorder:
        backbone(inputs)
    return {tuple(block): recorder.records[turns[tuple(block)]] for block in blocks}
