"""What may stand beside the weights in a checkpoint, and what the error says of what may not."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba.checkpoint import CheckpointError, load_from_local


def read_back(value, folder):
    """Returns a value of a checkpoint's meta data after it was saved and read by MMEngine's loader."""
    path = folder / 'file.pth'
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': {'value': value}}, path)
    return CheckpointLoader.load_checkpoint(str(path))['meta']['value']


DTYPES = [code for code in np.typecodes['All'] if code not in 'OV']


@pytest.mark.parametrize('shape', [(), (0,), (2, 3)])
@pytest.mark.parametrize('code', DTYPES)
def test_plain_arrays_of_every_dtype(code, shape, tmp_path):
    dtype = np.dtype({'U': 'U5', 'S': 'S5', 'm': 'm8[ns]', 'M': 'M8[s]'}.get(code, code))
    array = np.zeros(shape, dtype)
    found = read_back(array, tmp_path)
    assert found.dtype == dtype
    assert np.array_equal(found, array)


def test_scalars_byte_orders_and_slices(tmp_path):
    values = [np.float16(0.5), np.uint8(3), np.bool_(True), np.arange(6, dtype='>i4'), np.arange(12.0).reshape(3, 4).T]
    values += [np.array(['person', 'Auto', 'été']), np.array([[220, 20, 60]], np.uint8)[:, ::-1]]
    for value in values:
        found = read_back(value, tmp_path)
        assert type(found) is type(value)
        assert found.dtype == pickle.loads(pickle.dumps(value)).dtype  # in the machine's byte order
        assert np.array_equal(found, value)


@pytest.mark.parametrize('array', [np.array([{}], object), np.zeros(2, [('a', 'i4')])], ids=['objects', 'structure'])
def test_arrays_of_objects_and_structures_are_refused(array, tmp_path):
    with pytest.raises(CheckpointError, match='not allowed'):
        read_back(array, tmp_path)


def test_a_namespace_and_paths(tmp_path):
    value = argparse.Namespace(lr=0.1, work_dir=pathlib.Path('/a/b'), pure=pathlib.PureWindowsPath('c:/d'))
    assert read_back(value, tmp_path) == value


@pytest.mark.skipif(os.name == 'nt', reason='the path would exist')
@pytest.mark.parametrize('module', ['pathlib', 'pathlib._local'])
def test_a_path_of_another_system_becomes_a_pure_one(module, tmp_path, monkeypatch):
    class WindowsPath:
        def __reduce__(self):
            return WindowsPath, ('c:\\', 'd')

    WindowsPath.__module__, WindowsPath.__qualname__ = module, 'WindowsPath'
    real = sys.modules.get(module)
    with monkeypatch.context() as patch:
        if real is None:
            patch.setitem(sys.modules, module, type(sys)(module))
        patch.setattr(sys.modules[module], 'WindowsPath', WindowsPath, raising=False)
        torch.save({'meta': {'value': WindowsPath()}}, tmp_path / 'windows.pth')
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'windows.pth'))['meta']['value']
    assert found == pathlib.PureWindowsPath('c:/d')


def test_omegaconf_containers(tmp_path):
    omegaconf = pytest.importorskip('omegaconf')
    content = {'lr': 0.1, 'steps': [1, 2.5, 'x', None, True], 'model': {'depth': '${lr}', 'key': b'x'}}
    config = omegaconf.OmegaConf.create(content)
    found = read_back(config, tmp_path)
    assert found == config
    assert found.model.depth == 0.1
    assert read_back(omegaconf.OmegaConf.create([1, {'a': 2}]), tmp_path) == [1, {'a': 2}]


class Settings:
    """A type that nobody has allowed."""

    def __init__(self, value):
        self.value = value


class Other(Settings):
    """Another one."""


def test_the_error_names_the_types_and_the_line_that_allows_them(tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_back([Settings(1), Other(2)], tmp_path)
    text = str(error.value)
    assert re.search(
        rf'file\.pth: expected .* not allowed \({__name__}\.Other, {__name__}\.Settings; if you trust', text
    )
    assert 'weights_only' not in text
    line = re.search(r'torch\.serialization\.add_safe_globals\(\[.*?\]\)', text).group()
    before = torch.serialization.get_safe_globals()
    try:
        module = __import__(re.search(r'import (\w+);', text).group(1))
        exec(line, {'torch': torch, module.__name__: module})
        assert [item.value for item in read_back([Settings(1), Other(2)], tmp_path)] == [1, 2]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class RunsCode:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize('function', [os.system, eval, exec], ids=lambda function: function.__name__)
def test_the_error_does_not_advise_to_allow_what_runs_code(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match='not allowed') as error:
        read_back(RunsCode(function, 'open("executed", "w")'), tmp_path)
    assert 'add_safe_globals' not in str(error.value)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('function', [os.system, eval, print], ids=lambda function: function.__name__)
def test_nor_does_it_for_a_file_before_pytorch_1_6(function, tmp_path):
    path = tmp_path / 'file.pth'
    torch.save({'meta': RunsCode(function, '')}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=rf'not allowed .*{function.__name__}') as error:
        load_from_local(str(path))
    assert 'add_safe_globals' not in str(error.value)
    torch.save({'meta': Settings(1)}, path, _use_new_zipfile_serialization=False)
    line = rf'\({__name__}\.Settings; .*torch\.serialization\.add_safe_globals\(\[{__name__}\.Settings\]\)\)'
    with pytest.raises(CheckpointError, match=line):
        load_from_local(str(path))


def test_the_error_never_advises_to_read_without_weights_only(tmp_path):
    path = tmp_path / 'file.pth'
    for value in (RunsCode(os.system, ''), collections.defaultdict(int, {1: 2}), Settings(1)):
        for zipped in (False, True):
            torch.save({'meta': value}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=r'file\.pth') as error:
                load_from_local(str(path))
            assert 'weights_only' not in str(error.value)


@pytest.mark.parametrize('value', [frozenset({1}), slice(1, None), range(3)], ids=lambda value: type(value).__name__)
def test_plain_values(value, tmp_path):
    assert read_back(value, tmp_path) == value


def test_the_metainfo_of_a_data_set_with_a_dict_of_its_own(tmp_path):
    """MMEngine stores it as it is, with the config's dicts in it."""
    config = Config({'metainfo': {'classes': ('a', 'b'), 'label_map': {'0': 1, 'of': [{'c': 2}]}}})
    metainfo = BaseDataset(lazy_init=True, metainfo=config.metainfo, serialize_data=False).metainfo
    assert type(metainfo['label_map']) is ConfigDict
    assert read_back(metainfo, tmp_path) == metainfo


def test_what_is_allowed_for_omegaconf_is_not_allowed_elsewhere(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=r'builtins\.list'):
        read_back(RunsCode(list, (1, 2)), tmp_path)
