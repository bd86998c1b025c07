"""Files of ``torch.save`` are read under ``weights_only``, by PyTorch and by hand as before PyTorch 2.6."""

import collections
import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmspatialmamba import weights_only
from mmspatialmamba.allowed_types import _CfgNode, always_allowed

DATA = Path(__file__).parent / 'data'
IMPLEMENTATIONS = ('native', 'by hand') if weights_only.NATIVE else ('by hand',)


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(weights_only, 'NATIVE', request.param == 'native')
    weights_only.allow(always_allowed())
    return request.param


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State(collections.OrderedDict):
    """A class that is not allowed."""


class Stated:
    """An object whose pickle sets the state of something else."""

    def __init__(self, owner, state):
        self.owner, self.state = owner, state

    def __reduce__(self):
        return _identity, (self.owner,), self.state


def _identity(value):
    return value


def equal(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def plain_values():
    weights = collections.OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.bfloat16))
    weights._metadata = {'': {'version': 1}}
    return {
        'state_dict': weights,
        'parameter': torch.nn.Parameter(torch.zeros(3)),
        'shared': [weights['a'], weights['a'][0]],
        'dtypes': [torch.float16, torch.bool, torch.uint8, torch.bfloat16],
        'meta': {'epoch': 3, 'names': ('one', 'two'), 'rate': 1e-4, 'none': None, 'many': set(range(3))},
        'numbers': [np.float64(0.5), np.int64(3), np.arange(4, dtype=np.float32)],
        'counter': collections.Counter('aab'),
    }


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_plain_values(tmp_path, zipped):
    path = str(tmp_path / 'file.pth')
    values = plain_values()
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    read = weights_only.load(path, 'cpu')
    assert equal(read, values)
    assert read['state_dict']._metadata == {'': {'version': 1}}
    assert read['shared'][0].data_ptr() == read['shared'][1].data_ptr()


@pytest.mark.parametrize('name', sorted(path.name for path in DATA.glob('*.pth')))
def test_reads_published_layouts(name):
    assert isinstance(weights_only.load(str(DATA / name), 'cpu'), dict)


def test_reads_the_message_hub(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    path = str(tmp_path / 'file.pth')
    torch.save({'message_hub': {'loss': buffer}}, path)
    read = weights_only.load(path)['message_hub']['loss']
    assert isinstance(read, HistoryBuffer)
    assert read.mean() == buffer.mean()


@pytest.mark.parametrize(
    'value',
    [
        Reduced(os.system, 'touch executed'),
        Reduced(eval, "open('executed', 'w')"),
        Reduced(exec, "open('executed', 'w')"),
        Reduced(getattr, HistoryBuffer, '__init__'),
        State(a=1),
        np.random.RandomState,
    ],
    ids=['system', 'eval', 'exec', 'method', 'class', 'numpy'],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_refuses_code(tmp_path, monkeypatch, value, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'a': torch.zeros(2)}, 'meta': value}, 'file.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        weights_only.load('file.pth')
    assert not Path('executed').exists()


@pytest.mark.parametrize('owner', [torch.Tensor, HistoryBuffer, collections.OrderedDict])
def test_refuses_to_change_a_class(tmp_path, owner):
    path = str(tmp_path / 'file.pth')
    torch.save(Stated(owner, (None, {'changed': 1})), path)
    with weights_only.allowed([_identity]), pytest.raises(pickle.UnpicklingError):
        weights_only.load(path)
    assert not hasattr(owner, 'changed')


@pytest.mark.parametrize('missing', ['_core', 'core'])
def test_numpy_of_either_layout(monkeypatch, missing):
    """numpy 1.26 has a stub of numpy 2's module, without its parts."""
    monkeypatch.setattr(np, missing, types.ModuleType(f'numpy.{missing}'), raising=False)
    functions = [entry[0] for entry in always_allowed() if isinstance(entry, tuple)]
    assert {'_reconstruct', 'scalar'} <= {function.__name__ for function in functions}


def test_refuses_torchscript(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), path)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        weights_only.load(path)


def test_allows_within_a_context(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save({'a': torch.zeros(2), 'state': State(b=1)}, path)
    name = f'{State.__module__}.{State.__qualname__}'
    with weights_only.allowed([(_CfgNode, name)]):
        assert weights_only.load(path)['state'] == {'b': 1}
    with pytest.raises(pickle.UnpicklingError):
        weights_only.load(path)
