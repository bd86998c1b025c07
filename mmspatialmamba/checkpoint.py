"""Checkpoint files: what may be read under PyTorch's ``weights_only``, the layouts of our backbones, and clear errors.

PyTorch's ``weights_only`` refuses the message hub that MMEngine stores beside the weights. `register` allows exactly
the types of that hub. The readers never switch ``weights_only`` off, as PyTorch's download of state dicts does, and the
onedl fork of MMEngine for a file that was refused. To them the yacs config in the original project's files is a plain
dict.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import dist
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from .checkpoint_names import find_table


class CheckpointError(RuntimeError):
    """A file cannot be read as a checkpoint."""


class ForbiddenContentError(CheckpointError, pickle.UnpicklingError):
    """A file is damaged, or holds types or code that are not allowed."""


def register() -> None:
    """Makes the types of MMEngine's checkpoints known to PyTorch, and this module's readers known to MMEngine.

    The readers replace MMEngine's for local files and for HTTP in the whole process: they refuse what holds more than
    plain values, and every failure to read is one `CheckpointError` that names the file. What holds none of this
    package's backbones they hand on as it is. What does hold one is given the layout that MMEngine loads from:

    - the weights under ``state_dict``, where they were under ``model``;
    - names without ``module.``, which wrapped models put before them;
    - the names of a published classifier, which have no prefix, as those of a model of a toolbox.
    """
    torch.serialization.add_safe_globals(_message_hub_globals())
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)


def load_from_local(filename: str, map_location: str | torch.device | None = None) -> object:
    """Reads a local file, with the errors and the layout that `register` describes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, or holds code or unknown types.
    """
    return _present(_read_local(filename, map_location), filename)


def read_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Reads a local checkpoint as it is.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, holds code or unknown types, or is no checkpoint.
    """
    checkpoint = _read_local(filename, map_location)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{filename}: expected a checkpoint, which is a dict with the key state_dict or model or with tensors, '
            f'found a {type(checkpoint).__name__}'
        )
    if not any(isinstance(value, torch.Tensor) for value in get_weights(checkpoint).values()):
        raise CheckpointError(
            f'{filename}: expected a checkpoint with tensors, found none; its keys are '
            f'{", ".join(map(str, list(checkpoint)[:10])) or "none"}'
        )
    return checkpoint


def _read_local(filename: str, map_location: str | torch.device | None) -> object:
    if not os.path.isfile(os.path.expanduser(filename)):
        raise FileNotFoundError(f'{filename}: expected a checkpoint file, found no such file')
    return _read(_load_intact, filename, map_location)


def _load_intact(filename: str, map_location: str | torch.device | None) -> object:
    """Reads a local file whose checksums are right, which ``torch.load`` does not look at."""
    path = os.path.expanduser(filename)
    if zipfile.is_zipfile(path):  # the format before PyTorch 1.6 has no checksums
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) leaves zeros.
            checked = any(record.CRC for record in archive.infolist())
            if checked and (record := archive.testzip()):
                raise ValueError(f'the checksum of its record {record} is wrong')
    return torch.load(path, map_location=map_location, weights_only=True)


def load_from_http(filename: str, map_location: str | torch.device | None = None) -> object:
    """Downloads and reads a file, with the errors and the layout that `register` describes.

    Raises:
        CheckpointError: The address cannot be read, or its file cannot, as in `load_from_local`.
    """
    return _present(_read(_load_downloaded, filename, map_location), filename)


def _load_downloaded(address: str, map_location: str | torch.device | None) -> object:
    """Reads a file from PyTorch's folder of downloads; the process of rank 0 fetches it if it is not there yet."""
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(address).path).name)
    first = dist.get_rank() == 0
    if not first:
        dist.barrier()
    if not path.exists():  # for other processes too, on a node that does not share the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))
    if first:
        dist.barrier()
    return _load_intact(str(path), map_location)


def _read(load: Callable, filename: str, map_location: str | torch.device | None) -> object:
    try:
        with torch.serialization.safe_globals([(_CfgNode, 'yacs.config.CfgNode')]):
            return load(filename, map_location=map_location)
    except pickle.UnpicklingError as error:
        reason = str(error).partition('\n')[0]
        raise ForbiddenContentError(
            f'{filename}: expected a checkpoint of tensors and plain values, found one that is damaged or that holds '
            f'types or code which are not allowed ({reason})'
        ) from error
    except Exception as error:
        raise CheckpointError(
            f'{filename}: expected a checkpoint written by torch.save, found a file that cannot be read, truncated or '
            f'damaged perhaps ({type(error).__name__}: {error})'
        ) from error


def get_weights(checkpoint: dict) -> dict:
    """Returns the dict that a checkpoint holds under ``state_dict``, else under ``model``, else the checkpoint."""
    found = (checkpoint.get(key) for key in ('state_dict', 'model'))
    return next((weights for weights in found if isinstance(weights, dict)), checkpoint)


def _present(checkpoint: object, filename: str) -> object:
    """Gives a checkpoint of one of our backbones the layout that `register` describes, and the file's name."""
    if not isinstance(checkpoint, dict):
        return checkpoint
    weights = get_weights(checkpoint)
    table = find_table(name for name in weights if isinstance(name, str))
    if table is not None:
        others = {} if weights is checkpoint else checkpoint
        weights = unwrap(weights)
        if table.is_official(weights):
            weights = OrderedDict((table.to_toolbox(name), value) for name, value in weights.items())
        checkpoint = {key: value for key, value in others.items() if key != 'model'} | {'state_dict': weights}
    return _name_source(checkpoint, filename)


def unwrap(weights: dict) -> OrderedDict:
    """Returns a state dict without the ``module.`` that wrappers of models put before each name, metadata too."""

    def renamed(names: dict) -> OrderedDict:
        return OrderedDict((re.sub(r'^(module\.)+', '', name), value) for name, value in names.items())

    result = renamed(weights)
    if hasattr(weights, '_metadata'):  # versions of the modules, by which heads recognize old names
        result._metadata = renamed(weights._metadata)
    return result


@dataclass(frozen=True)
class Source:
    """Where a state dict was read.

    Attributes:
        file: The file.
        names: Names of its entries.
    """

    KEY: ClassVar[str] = 'checkpoint_source'
    """Under which a module finds it in the metadata that it loads with."""

    file: str
    names: tuple[str, ...]


class SourceMetadata(OrderedDict):
    """The ``_metadata`` of a state dict, which tells every module that loads from it where it was read.

    Args:
        metadata: The metadata that the file holds: a dict for each module's name.
        source: What it tells.
    """

    def __init__(self, metadata: dict, source: Source):
        super().__init__(metadata)
        self.source = source

    def get(self, module: str, default: dict | None = None) -> dict:
        """Returns a module's metadata, the source among them."""
        return {**super().get(module, default or {}), Source.KEY: self.source}

    def __reduce__(self):
        return OrderedDict, (dict(self),)


def _name_source(checkpoint: dict, filename: str) -> dict:
    """Attaches the file's name to what MMEngine takes for the state dict, so that a module can name it in an error."""
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, dict) or not (not weights or any(map(_holds_tensors, weights.values()))):
        return checkpoint
    named = weights if isinstance(weights, OrderedDict) else OrderedDict(weights)
    named._metadata = SourceMetadata(getattr(weights, '_metadata', {}), Source(filename, tuple(map(str, weights))))
    if weights is checkpoint:
        return named
    checkpoint['state_dict'] = named
    return checkpoint


def _holds_tensors(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(value, torch.Tensor) for value in values)


class _CfgNode:
    """Stands in for ``yacs.config.CfgNode`` while a checkpoint is read: makes dicts.

    The unpickler of ``weights_only`` fills no other type: it refuses the real class even where yacs is installed and
    allowed.
    """

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def _message_hub_globals() -> list:
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    functions = (multiarray._reconstruct, multiarray.scalar)
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since numpy 2
    dtypes = ('float32', 'float64', 'int32', 'int64')
    return [
        HistoryBuffer,
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in dtypes),
        *((f, f'{module}.{f.__name__}') for f in functions for module in modules),
    ]


def _history_buffer_method(owner: object, name: str) -> Callable:
    """Stands in for ``getattr`` while a checkpoint is read: gives HistoryBuffer's statistics and nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'attribute {name!r} of {owner!r} is not allowed in a checkpoint')
    return getattr(HistoryBuffer, name)
