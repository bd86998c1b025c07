"""Checkpoint files: what may be read under PyTorch's ``weights_only``, the published layout, and clear errors.

PyTorch's ``weights_only`` refuses the message hub that MMEngine stores beside the weights. `register` allows exactly
the types of that hub. The readers never switch ``weights_only`` off, as PyTorch's download of state dicts does, and the
onedl fork of MMEngine for a file that was refused. To them the yacs config in the original project's files is a plain
dict.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import dist
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from . import weights_only
from .checkpoint_names import BACKBONE_PREFIX


class CheckpointError(RuntimeError):
    """A file cannot be read as a checkpoint."""


def register() -> None:
    """Makes the types of MMEngine's checkpoints known to PyTorch, and this module's readers known to MMEngine.

    The readers replace MMEngine's for local files and for HTTP in the whole process: they refuse what holds more than
    plain values, turn every failure into one `CheckpointError` that names the file, and present the published
    classification layout as that of a classifier. Other files pass through them unchanged.
    """
    weights_only.allow(_message_hub_globals())
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)


def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Reads a local checkpoint, with the errors and the layout that `register` describes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, holds code or unknown types, or is no checkpoint.
    """
    return _present(read_local(filename, map_location), filename)


def read_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Reads a local checkpoint as `load_from_local` does, but leaves its keys and names as they are.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, holds code or unknown types, or is no checkpoint.
    """
    if not os.path.isfile(os.path.expanduser(filename)):
        raise FileNotFoundError(f'{filename}: expected a checkpoint file, found no such file')
    return _read(_load_intact, filename, map_location)


def _load_intact(filename: str, map_location: str | torch.device | None) -> dict:
    """Reads a local file whose checksums are right, which ``torch.load`` does not look at."""
    path = os.path.expanduser(filename)
    if zipfile.is_zipfile(path):  # the format before PyTorch 1.6 has no checksums
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) leaves zeros.
            checked = any(record.CRC for record in archive.infolist())
            if checked and (record := archive.testzip()):
                raise ValueError(f'the checksum of its record {record} is wrong')
    return weights_only.load(path, map_location)


def load_from_http(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Downloads and reads a checkpoint, with the errors and the layout that `register` describes.

    Raises:
        CheckpointError: The address cannot be read, or its file is not a checkpoint as in `load_from_local`.
    """
    return _present(_read(_load_downloaded, filename, map_location), filename)


def _load_downloaded(address: str, map_location: str | torch.device | None) -> dict:
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


def _read(load: Callable, filename: str, map_location: str | torch.device | None) -> dict:
    try:
        with weights_only.allowed([(_CfgNode, 'yacs.config.CfgNode')]):
            checkpoint = load(filename, map_location=map_location)
    except pickle.UnpicklingError as error:
        reason = str(error).partition('\n')[0]
        raise CheckpointError(
            f'{filename}: expected a checkpoint of tensors and plain values, found one that is damaged or that holds '
            f'types or code which are not allowed ({reason})'
        ) from error
    except Exception as error:
        raise CheckpointError(
            f'{filename}: expected a checkpoint written by torch.save, found a file that cannot be read, truncated or '
            f'damaged perhaps ({type(error).__name__}: {error})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{filename}: expected a checkpoint, which is a dict with the key state_dict or model or with tensors, '
            f'found a {type(checkpoint).__name__}'
        )
    weights = get_weights(checkpoint)
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(
            f'{filename}: expected a checkpoint with tensors, found none; its keys are '
            f'{", ".join(map(str, list(checkpoint)[:10])) or "none"}'
        )
    return checkpoint


def get_weights(checkpoint: dict) -> dict:
    """Returns what a checkpoint holds under ``state_dict``, else under ``model``, else the checkpoint itself."""
    return checkpoint.get('state_dict', checkpoint.get('model', checkpoint))


def _present(checkpoint: dict, filename: str) -> dict:
    """Gives a checkpoint the layout that `register` describes, and the file's name."""
    weights = get_weights(checkpoint)
    if 'state_dict' not in checkpoint and any('.state_fusion.' in str(name) for name in weights):
        weights = _as_classifier(weights)
        checkpoint = {'state_dict': weights}
    return _name_source(checkpoint, filename)


class SourceMetadata(OrderedDict):
    """The ``_metadata`` of a state dict, which tells every module that loads from it the file that it was read from.

    Args:
        metadata: The metadata that the file holds: a dict for each module's name.
        filename: The file.
    """

    KEY = 'checkpoint_file'

    def __init__(self, metadata: dict, filename: str):
        super().__init__(metadata)
        self.filename = filename

    def get(self, module: str, default: dict | None = None) -> dict:
        """Returns a module's metadata, the name of the file among them."""
        return {**super().get(module, default or {}), self.KEY: self.filename}

    def __reduce__(self):
        return OrderedDict, (dict(self),)


def _name_source(checkpoint: dict, filename: str) -> dict:
    """Attaches the file's name to the state dict, so that a module can refuse a file that matches nothing."""
    weights = checkpoint.get('state_dict', checkpoint)
    metadata = getattr(weights, '_metadata', {})
    weights = OrderedDict(weights)
    weights._metadata = SourceMetadata(metadata, filename)
    return {**checkpoint, 'state_dict': weights} if 'state_dict' in checkpoint else weights


def _as_classifier(weights: dict) -> dict:
    """Renames published classification weights to the modules of an mmpretrain ``ImageClassifier``."""
    head = 'head.'
    return {
        f'head.fc.{name.removeprefix(head)}' if name.startswith(head) else BACKBONE_PREFIX + name: tensor
        for name, tensor in weights.items()
    }


class _CfgNode:
    """Stands in for ``yacs.config.CfgNode`` while a checkpoint is read: makes dicts.

    The unpickler of ``weights_only`` fills no other type: it refuses the real class even where yacs is installed and
    allowed.
    """

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def _message_hub_globals() -> list:
    # What numpy's own pickles name; the module that holds these functions differs between versions.
    functions = (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])
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
