"""PyTorch's ``weights_only`` with types that a caller allows; before PyTorch 2.6, which knows that itself, by hand."""

import codecs
import pickle
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .ops.compat import VERSION

NATIVE = VERSION >= (2, 6)
"""Whether PyTorch takes objects together with the names under which files hold them."""

_allowed: dict[str, object] = {}


def allow(objects: list) -> None:
    """Allows objects, or pairs of an object and the name under which files hold it, in the whole process."""
    if NATIVE:
        torch.serialization.add_safe_globals(objects)
    else:
        _allowed.update(map(_named, objects))


@contextmanager
def allowed(objects: list) -> Iterator[None]:
    """Allows objects, as `allow` takes them, within a context."""
    if NATIVE:
        with torch.serialization.safe_globals(objects):
            yield
        return
    before = dict(_allowed)
    allow(objects)
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


def load(path: str, map_location: str | torch.device | None = None) -> object:
    """Reads a file of ``torch.save`` that holds tensors, plain values and what is allowed.

    Raises:
        pickle.UnpicklingError: The file holds something else.
    """
    if NATIVE:
        return torch.load(path, map_location=map_location, weights_only=True)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.load would hand it to torch.jit.load.
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                raise pickle.UnpicklingError('a TorchScript archive is not allowed')
    return torch.load(path, map_location=map_location, pickle_module=_PICKLE, weights_only=False)


def _named(entry: object) -> tuple[str, object]:
    thing, name = entry if isinstance(entry, tuple) else (entry, f'{entry.__module__}.{entry.__qualname__}')
    return name, thing


class _Unpickler(pickle._Unpickler):
    """Finds nothing but what is allowed, and fills in the state of nothing but instances of it.

    In Python, as the one in C takes no other meaning for an opcode; the tensors' bytes do not pass through it.
    """

    def find_class(self, module: str, name: str) -> object:
        full_name = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        if full_name not in (known := _known()):
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full_name}')
        return known[full_name]

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        kind = type(instance)
        if kind is OrderedDict:
            vars(instance).update(state)
        elif kind is torch.Tensor:  # as files before PyTorch 1.6 hold them
            instance.set_(*state)
        elif kind is not torch.nn.Parameter and kind not in _allowed.values():
            raise pickle.UnpicklingError(f'the state of a {kind.__name__} is not allowed')
        elif hasattr(instance, '__setstate__'):
            instance.__setstate__(state)
        else:
            vars(instance).update(state)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012 - as in the base class


def _known() -> dict[str, object]:
    """What PyTorch's own restricted unpickler finds, what later versions find besides, and what is allowed."""
    dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    later = {'_codecs.encode': codecs.encode, 'collections.Counter': Counter, 'builtins.set': set}
    later['torch._utils._rebuild_qtensor'] = torch._utils._rebuild_qtensor
    later |= {str(scheme): scheme for scheme in (torch.per_tensor_affine, torch.per_channel_affine)}
    return {**torch._weights_only_unpickler._get_allowed_globals(), **dtypes, **later, **_allowed}


_PICKLE = types.SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load(), __name__=__name__
)
