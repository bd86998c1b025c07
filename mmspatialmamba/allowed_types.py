"""What a checkpoint may hold beside tensors under PyTorch's ``weights_only``: plain values of known types, no code."""

import argparse
import builtins
import importlib
import importlib.util
import inspect
import os
import pathlib
import pickle
import re
import typing
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from . import weights_only

NEVER_ADVISED = (
    'builtins',
    'ctypes',
    'importlib',
    'nt',
    'os',
    'pickle',
    'posix',
    'runpy',
    'shutil',
    'subprocess',
    'sys',
)
"""Modules whose names an error does not advise to allow: what they hold runs code."""


def always_allowed() -> list:
    """Returns what is allowed in the whole process: MMEngine's message hub and configs, arrays, plain values, paths."""
    return [
        HistoryBuffer,
        (_history_buffer_method, 'builtins.getattr'),
        ConfigDict,  # of a data set's metainfo, where that holds dicts
        argparse.Namespace,
        frozenset,
        range,
        slice,
        *_paths(),
        *_arrays(),
    ]


@contextmanager
def allowing_harmless_types(path: str) -> Iterator[None]:
    """Allows, while a file is read, a yacs config, which becomes a dict, and omegaconf's containers.

    Raises:
        pickle.UnpicklingError: Reading stopped at what is not allowed. The error says what that is, and which line
            allows it, if it is a type.
    """
    allowed = [(_CfgNode, 'yacs.config.CfgNode')]
    refused = _refused_names(path)
    if (refused is None or any(map(_is_omegaconf, refused))) and importlib.util.find_spec('omegaconf'):
        allowed += _omegaconf()
    with weights_only.allowed(allowed):
        try:
            yield
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(_describe(path, str(error))) from error


def _is_omegaconf(name: str) -> bool:
    return name.startswith('omegaconf.')


def _describe(path: str, error: str) -> str:
    names = _refused_names(path) if 'GLOBAL' in error else []
    if not names:  # which only the error says: one at a time, those of builtins without their module
        named = re.findall(r'GLOBAL (\S+)(?: was not| whose module|$)', error)
        names = [name if '.' in name else f'builtins.{name}' for name in named]
    names = sorted(names)
    if not names:
        return re.sub(r'^Weights only load failed.*\n|WeightsUnpickler error:', '', error).strip().partition('\n')[0]
    if any(name.partition('.')[0] in NEVER_ADVISED for name in names):
        return ', '.join(names)
    modules = sorted({name.rpartition('.')[0] for name in names})
    return (
        f'{", ".join(names)}; if you trust the file, allow it before it is read: import {", ".join(modules)}; '
        f'torch.serialization.add_safe_globals([{", ".join(names)}])'
    )


def _refused_names(path: str) -> list[str] | None:
    """Returns the names in a file that are not allowed at present; None if this PyTorch cannot say."""
    if not weights_only.NATIVE:
        return None
    if not zipfile.is_zipfile(path):  # the format before PyTorch 1.6
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _arrays() -> list:
    """Returns what arrays and scalars of every dtype are pickled with, but of objects and of structures.

    Those two are left out: their pickles set flags of the dtype, by which bytes would pass for pointers.
    """
    # What numpy's own pickles name; the module that holds these functions differs between versions.
    functions = (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since numpy 2
    kinds = {type(np.dtype(code)) for code in np.typecodes['All'] if code not in 'OV'}
    return [
        np.ndarray,
        np.dtype,
        bytes,  # of an array without elements
        *kinds,
        *((function, f'{module}.{function.__name__}') for function in functions for module in modules),
    ]


def _paths() -> list:
    """Returns paths; those of another system, which cannot exist here, become pure ones."""
    native, other = ('Windows', 'Posix') if os.name == 'nt' else ('Posix', 'Windows')
    names = {
        'PurePath': pathlib.PurePath,
        'PurePosixPath': pathlib.PurePosixPath,
        'PureWindowsPath': pathlib.PureWindowsPath,
        f'{native}Path': getattr(pathlib, f'{native}Path'),
        f'{other}Path': getattr(pathlib, f'Pure{other}Path'),
    }
    modules = ('pathlib', 'pathlib._local')  # Python 3.13 has the second
    return [(path, f'{module}.{name}') for name, path in names.items() for module in modules]


def _omegaconf() -> list:
    modules = [importlib.import_module(f'omegaconf.{name}') for name in ('dictconfig', 'listconfig', 'base', 'nodes')]
    nodes = [
        value for value in vars(modules[3]).values() if inspect.isclass(value) and value.__module__ == 'omegaconf.nodes'
    ]
    containers = [modules[0].DictConfig, modules[1].ListConfig, modules[2].ContainerMetadata, modules[2].Metadata]
    plain = [getattr(builtins, name) for name in ('bool', 'bytes', 'dict', 'float', 'int', 'list', 'str', 'tuple')]
    return [*containers, *nodes, *plain, (typing.Any, 'typing.Any'), defaultdict]


class _CfgNode:
    """Stands in for ``yacs.config.CfgNode`` while a checkpoint is read: makes dicts.

    The unpickler of ``weights_only`` fills no other type: it refuses the real class even where yacs is installed and
    allowed.
    """

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def _history_buffer_method(owner: object, name: str) -> Callable:
    """Stands in for ``getattr`` while a checkpoint is read: gives HistoryBuffer's statistics and nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'attribute {name!r} of {owner!r} is not allowed in a checkpoint')
    return getattr(HistoryBuffer, name)
