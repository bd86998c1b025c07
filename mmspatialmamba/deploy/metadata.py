"""What a file says beside its graph, for tools/run_onnx.py: names of the classes, and how a picture is resized."""

import json

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from .refusals import CannotExport, require

KEY = 'mmspatialmamba'
"""Name of the entry in the file's metadata."""

IGNORED = ('LoadAnnotations', 'PackDetInputs')


def describe(config: Config, model: nn.Module) -> dict:
    """Returns what the file says, as a dict for JSON.

    Args:
        config: The model's config; its test pipeline says how a picture is resized.
        model: The model; ``dataset_meta``, as a checkpoint brings it, names the classes.

    Raises:
        CannotExport: The test pipeline does more to a picture than a resize and a padding.
    """
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    require('test_dataloader.dataset.pipeline', 'a pipeline', None, 'pipeline' in dataset)
    found = {'classes': _classes(dataset, model), 'scale': None, 'keep_ratio': None, 'pad': None}
    for step in dataset.pipeline:
        name = step.type if isinstance(step.type, str) else step.type.__name__
        name = name.rsplit('.', 1)[-1]
        if name == 'LoadImageFromFile':
            _allow(step, name, ('backend_args', 'imdecode_backend'))
            backend = step.get('imdecode_backend', 'cv2')
            require('LoadImageFromFile.imdecode_backend', 'cv2', backend, backend == 'cv2')
        elif name == 'Resize':
            _allow(step, name, ('scale', 'keep_ratio'))
            require('Resize', 'one Resize with a scale', step, 'scale' in step and found['scale'] is None)
            scale = step.scale
            found['scale'] = list(scale) if isinstance(scale, (list, tuple)) else [scale, scale]
            found['keep_ratio'] = bool(step.get('keep_ratio', False))
        elif name == 'Pad':
            _allow(step, name, ('size', 'pad_val'))
            require('Pad', 'a size, after the Resize', step, 'size' in step and found['scale'] is not None)
            value = step.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, dict) else value
            width, height = step.size
            value = list(value) if isinstance(value, (list, tuple)) else [value] * 3
            found['pad'] = {'width': width, 'height': height, 'value': value}
        elif name not in IGNORED:
            raise CannotExport(f'test pipeline: expected LoadImageFromFile, Resize and perhaps Pad, found {name}')
    require('test pipeline', 'a Resize', 'none', found['scale'] is not None)
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is not None and roi_head.with_mask:
        found['mask_threshold'] = roi_head.test_cfg.mask_thr_binary
    return found


def _allow(step: dict, name: str, options: tuple[str, ...]) -> None:
    others = [key for key in step if key not in ('type', *options)]
    require(f'test pipeline: {name}', f'no options but {", ".join(options)}', ', '.join(others), not others)


def _classes(dataset: dict, model: nn.Module) -> list[str]:
    """Returns the names of the classes: the checkpoint's, the config's, or those of the data set's class."""
    for source in (getattr(model, 'dataset_meta', None), dataset.get('metainfo')):
        if source and source.get('classes'):
            return list(source['classes'])
    kind = DATASETS.get(dataset.type) if isinstance(dataset.get('type'), str) else dataset.get('type')
    return list(getattr(kind, 'METAINFO', {}).get('classes', ()))


def write(program: torch.onnx.ONNXProgram, description: dict) -> None:
    """Writes a description into a program's metadata."""
    program.model.metadata_props[KEY] = json.dumps(description)
