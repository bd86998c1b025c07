"""Checkpoint files: published layouts, MMEngine's own files under weights_only, and each bad file's one error."""

import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.checkpoint_names import to_official

DATA = Path(__file__).parent / 'data'
CLASSIFICATION = str(DATA / 'official_small_classification.pth')
DETECTOR = str(DATA / 'official_small_detector.pth')
ARCH = {'embed_dims': 16, 'depths': (1, 1, 2, 1)}


class Detector(BaseModule):
    """A model that has a backbone and a head, as a detector has."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = SpatialMamba(ARCH, **backbone)
        self.head = torch.nn.Linear(2, 2)


def assert_holds(backbone, path, names=lambda name: True):
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint.get('model', checkpoint.get('state_dict'))
    compared = 0
    for name, tensor in backbone.state_dict().items():
        official = to_official(name)
        for candidate in (official, f'backbone.{official}'):
            if candidate in state:
                assert torch.equal(tensor, state[candidate]), name
                compared += 1
    assert compared >= 198


@pytest.mark.parametrize(
    'init_cfg',
    [
        {'checkpoint': CLASSIFICATION},
        {'checkpoint': CLASSIFICATION, 'prefix': 'backbone'},
        {'checkpoint': DETECTOR, 'prefix': 'backbone'},
        {'checkpoint': DETECTOR},
    ],
    ids=['classification', 'classification-prefix', 'detector-prefix', 'detector'],
)
def test_init_cfg_loads_published_files_as_they_are(init_cfg):
    backbone = SpatialMamba(ARCH, init_cfg={'type': 'Pretrained', **init_cfg})
    backbone.init_weights()
    assert_holds(backbone, init_cfg['checkpoint'])


def test_pretrained_is_short_for_init_cfg():
    detector = Detector(pretrained=CLASSIFICATION)
    detector.init_weights()
    assert_holds(detector.backbone, CLASSIFICATION)


@pytest.mark.parametrize('path', [CLASSIFICATION, DETECTOR])
def test_load_from_loads_published_files_as_they_are(path):
    detector = Detector()
    load_checkpoint(detector, path, map_location='cpu')
    assert_holds(detector.backbone, path)


def message_hub_file(path):
    hub = MessageHub('test_checkpoint')
    hub.update_scalar('train/loss', 1.5)
    hub.update_scalar('train/lr', np.float32(1e-3))
    hub.update_info('best_score', np.float64(0.5))
    torch.save({'state_dict': SpatialMamba(ARCH).state_dict(), 'message_hub': hub.state_dict()}, path)


def test_reads_mmengines_own_files(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    message_hub_file(path)
    hub = CheckpointLoader.load_checkpoint(str(path))['message_hub']
    buffer = hub['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.current() == 1.5
    assert buffer.statistics('mean') == 1.5
    assert hub['runtime_info']['best_score'] == 0.5


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch executed',)


class TakesAnAttribute:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    'payload',
    [
        RunsCode(),
        TakesAnAttribute(HistoryBuffer, '__init__'),
        TakesAnAttribute(HistoryBuffer, 'register_statistics'),
        TakesAnAttribute(np.ndarray, 'tofile'),
        TakesAnAttribute(torch.nn.Linear, 'forward'),
    ],
    ids=['os.system', 'HistoryBuffer.__init__', 'register_statistics', 'ndarray.tofile', 'Linear.forward'],
)
def test_a_file_that_runs_code_is_refused(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'payload': payload}, 'hostile.pth')
    with pytest.raises(CheckpointError, match=r'hostile.pth: expected a checkpoint .* not allowed'):
        CheckpointLoader.load_checkpoint('hostile.pth')
    assert not (tmp_path / 'executed').exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server of the files in ``served``, in a process of whose downloads nothing stays."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'downloads'))
    served = tmp_path / 'served'
    served.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http_server.server_port}'
        http_server.shutdown()


def test_a_file_is_read_from_its_address(server, tmp_path):
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'served' / 'good.pth')
    for _ in range(2):  # downloaded, then from the folder of downloads
        weights = CheckpointLoader.load_checkpoint(f'{server}/good.pth')['state_dict']
        assert torch.equal(weights['a'], torch.ones(1))
        (tmp_path / 'served' / 'good.pth').unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r'missing.pth: expected a checkpoint .* 404'):
        CheckpointLoader.load_checkpoint(f'{server}/missing.pth')


def test_a_downloaded_file_that_runs_code_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'payload': RunsCode()}, tmp_path / 'served' / 'hostile.pth')
    with pytest.raises(CheckpointError, match=r'hostile.pth: expected a checkpoint .* not allowed'):
        CheckpointLoader.load_checkpoint(f'{server}/hostile.pth')
    assert not (tmp_path / 'executed').exists()


def damage(path, how):
    content = bytearray(Path(DETECTOR).read_bytes())
    if how == 'empty':
        content = b''
    elif how == 'truncated':
        content = content[: len(content) // 2]
    elif how == 'text':
        content = b'<html>Not found</html>'
    elif how == 'pickle':
        content = pickle.dumps({'a': 1})[:-3]
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['empty', 'truncated', 'text', 'pickle'])
@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_damaged_file_raises(tmp_path, how, route):
    path = tmp_path / 'broken.pth'
    damage(path, how)
    with pytest.raises(CheckpointError, match=r'broken\.pth: expected a checkpoint'):
        load(route, path)


def load(route, path):
    if route == 'init_cfg':
        SpatialMamba(ARCH, pretrained=str(path)).init_weights()
    else:
        load_checkpoint(Detector(), str(path))


@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_missing_file_raises(tmp_path, route):
    with pytest.raises(FileNotFoundError, match=r'none\.pth: expected a checkpoint file, found no such file'):
        load(route, tmp_path / 'none.pth')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([1, 2], 'expected a checkpoint, which is a dict .* found a list'),
        ({}, 'expected a checkpoint with tensors, found none'),
        ({'state_dict': {}, 'meta': {}}, '.*its keys are state_dict, meta'),
    ],
)
@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_file_that_is_no_checkpoint_raises(tmp_path, content, message, route):
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'other.pth: {message}'):
        load(route, path)


@pytest.mark.parametrize('layout', ['state_dict', 'model', None])
@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_file_that_matches_nothing_raises(tmp_path, route, layout):
    path = tmp_path / 'resnet.pth'
    state = {'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.bias': torch.zeros(1000)}
    torch.save({layout: state} if layout else state, path)
    with pytest.raises(RuntimeError, match=r'resnet\.pth matches nothing: expected 206 tensors'):
        load(route, path)


def test_files_of_other_models_keep_their_layout(tmp_path):
    path = str(tmp_path / 'swin.pth')
    content = {'model': {'layers.0.weight': torch.zeros(2)}, 'epoch': 3}
    torch.save(content, path)
    checkpoint = CheckpointLoader.load_checkpoint(path)
    assert checkpoint.keys() == content.keys()
    assert checkpoint['model'].keys() == content['model'].keys()


def test_a_checkpoint_that_was_read_can_be_saved_again(tmp_path):
    checkpoint = CheckpointLoader.load_checkpoint(DETECTOR)
    path = str(tmp_path / 'again.pth')
    torch.save(checkpoint, path)
    again = torch.load(path, weights_only=True)
    assert again['state_dict'].keys() == checkpoint['state_dict'].keys()


def test_an_absent_prefix_raises():
    backbone = SpatialMamba(ARCH, init_cfg={'type': 'Pretrained', 'checkpoint': DETECTOR, 'prefix': 'encoder'})
    with pytest.raises(AssertionError, match=r'encoder\. is not in the pretrained model'):
        backbone.init_weights()
