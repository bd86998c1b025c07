"""Checkpoint files: what may be read under PyTorch's ``weights_only``, the layouts of our backbones, and clear errors.

PyTorch's ``weights_only`` refuses the message hub that MMEngine stores beside the weights, and arrays. `register`
allows a short list of harmless types (`mmspatialmamba.allowed_types`). The readers never switch ``weights_only`` off,
as PyTorch's download of state dicts does, and the onedl fork of MMEngine for a file that was refused.
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from . import weights_only
from .allowed_types import allowing_harmless_types, always_allowed
from .checkpoint_names import find_table
from .download import DownloadError, cached, download, on_every_rank
from .published import SCHEMES, find_model, find_weights


class CheckpointError(RuntimeError):
    """A file cannot be read as a checkpoint."""


class ForbiddenContentError(CheckpointError, pickle.UnpicklingError):
    """A file is damaged, or holds types or code that are not allowed."""


def register() -> None:
    """Makes the types of checkpoints known to PyTorch, and this module's readers known to MMEngine.

    The readers replace MMEngine's for local files and for HTTP in the whole process, and add one for published models
    by name, such as ``spatialmamba://cls_sm_t``: they refuse what holds more than plain values, and every failure to
    read is one `CheckpointError` that names the file. What holds none of this package's backbones they hand on as it
    is. What does hold one is given the layout that MMEngine loads from:

    - the weights under ``state_dict``, where they were under ``model``;
    - names without ``module.``, which wrapped models put before them;
    - the names of a published classifier, which have no prefix, as those of a model of a toolbox.
    """
    weights_only.allow(always_allowed())
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)
    names = tuple(f'{scheme}://' for scheme in SCHEMES)
    CheckpointLoader.register_scheme(prefixes=names, loader=load_from_published, force=True)


def load_from_local(filename: str, map_location: str | torch.device | None = None) -> object:
    """Reads a local file, with the errors and the layout that `register` describes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, or holds code or unknown types.
    """
    return _present(_read(filename, map_location), filename)


def load_from_http(filename: str, map_location: str | torch.device | None = None) -> object:
    """Downloads and reads a file, with the errors and the layout that `register` describes.

    The file stays in PyTorch's folder of downloads, see `mmspatialmamba.download`.

    Raises:
        CheckpointError: The address cannot be read, or its file cannot, as in `load_from_local`.
    """
    return _present(_read(filename, map_location), filename)


def load_from_published(filename: str, map_location: str | torch.device | None = None) -> object:
    """Reads the weights of a published model by its name, such as ``spatialmamba://cls_sm_t``, downloaded if need be.

    Raises:
        CheckpointError: There is no such model, or its file cannot be had or read, see `mmspatialmamba.published`.
    """
    return _present(_read(filename, map_location), filename)


def read(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Reads a checkpoint as it is.

    Args:
        filename: A path, an address, or the name of a published model.
        map_location: Device of the tensors.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be had, is damaged, holds code or unknown types, or is no checkpoint.
    """
    checkpoint = _read(filename, map_location)
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


def locate(filename: str) -> Path:
    """Returns the local file of a path, an address or the name of a published model, downloaded if need be.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be downloaded.
    """
    scheme = filename.partition('://')[0] if '://' in filename else None
    if scheme in SCHEMES:
        try:
            return find_weights(find_model(filename))
        except (KeyError, DownloadError) as error:
            raise CheckpointError(error.args[0]) from error
    if scheme in ('http', 'https'):
        try:
            return on_every_rank(partial(download, filename))
        except DownloadError as error:
            raise CheckpointError(
                f'{filename}: expected a checkpoint at this address, found none that can be read ({error}). Without a '
                f'network, put the file there by hand: {cached(filename)}'
            ) from error
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{filename}: expected a checkpoint file, found no such file')
    return path


def _read(filename: str, map_location: str | torch.device | None) -> object:
    """Reads a file; its errors begin with its name and, where this is no path, end with its path."""
    path = str(locate(filename))
    where = f'. It lies at {path}: delete it to have it downloaded again' if '://' in filename else ''
    try:
        if path.endswith('.safetensors'):
            return _read_safetensors(path, map_location)
        check_sums(path)
        with allowing_harmless_types(path):
            return weights_only.load(path, map_location)
    except pickle.UnpicklingError as error:
        raise ForbiddenContentError(
            f'{filename}: expected a checkpoint of tensors and plain values, found one that is damaged or that holds '
            f'types or code which are not allowed ({error}){where}'
        ) from error
    except ModuleNotFoundError as error:
        raise CheckpointError(f'{filename}: {error}, which reads such files: pip install {error.name}') from error
    except Exception as error:
        raise CheckpointError(
            f'{filename}: expected a checkpoint written by torch.save or safetensors, found a file that cannot be '
            f'read, truncated or damaged perhaps ({type(error).__name__}: {error}){where}'
        ) from error


NOTES = 'mmspatialmamba'
"""Where a safetensors file of `tools/convert_checkpoint.py` holds what stands beside the tensors, as JSON."""


def _read_safetensors(path: str, map_location: str | torch.device | None) -> dict:
    """Reads tensors, and the meta data and the modules' versions that `tools/convert_checkpoint.py` writes."""
    from safetensors import safe_open  # not required by this package

    with safe_open(path, framework='pt') as file:
        names = file.keys()
        weights = OrderedDict((name, file.get_tensor(name).to(map_location or 'cpu')) for name in names)
        notes = json.loads((file.metadata() or {}).get(NOTES, '{}'))
    if 'versions' in notes:
        weights._metadata = OrderedDict(notes['versions'])
    return {'meta': notes['meta'], 'state_dict': weights} if 'meta' in notes else weights


def check_sums(path: str) -> None:
    """Raises a ValueError if a checksum in a file is wrong, which ``torch.load`` does not look at."""
    if not zipfile.is_zipfile(path):  # the format before PyTorch 1.6 has none
        return
    with zipfile.ZipFile(path) as archive:
        # torch.serialization.set_crc32_options(False) leaves zeros.
        checked = any(record.CRC for record in archive.infolist())
        if checked and (record := archive.testzip()):
            raise ValueError(f'the checksum of its record {record} is wrong')


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
            renamed = ((table.to_toolbox(name), value) for name, value in weights.items())
            weights = OrderedDict((name, table.to_own_value(name, value)) for name, value in renamed)
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
