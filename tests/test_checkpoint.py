"""Checkpoint files: published layouts, MMEngine's own files under weights_only, and each bad file's one error."""

import copy
import logging
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, each_family, each_golden_set
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmspatialmamba.ops.compat import VERSION
from torch.ao.quantization import quantize_dynamic

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint import CheckpointError

SPATIAL, VMAMBA = FAMILIES[:2]
CLASSIFICATION, DETECTOR, ARCH = SPATIAL.classification, SPATIAL.detector, SPATIAL.arch
LAYOUTS = ('classification', 'detector')


class Detector(BaseModule):
    """A model that has a backbone and a head, as a detector has."""

    def __init__(self, family=SPATIAL, **backbone):
        super().__init__()
        self.backbone = family.build(**backbone)
        self.head = torch.nn.Linear(2, 2)


def assert_holds(backbone, path):
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint.get('model', checkpoint.get('state_dict'))
    missing = []
    for name, tensor in backbone.state_dict().items():
        official = backbone.NAMES.to_official(name)
        candidates = [candidate for candidate in (official, f'backbone.{official}') if candidate in state]
        for candidate in candidates:
            assert torch.equal(backbone.NAMES.to_official_value(name, tensor), state[candidate]), name
        if not candidates:
            missing.append(name)
    assert all(name.startswith('out_norms.') for name in missing)
    assert bool(missing) == ('model' in checkpoint)


@each_golden_set
@pytest.mark.parametrize('prefix', [{}, {'prefix': 'backbone'}], ids=['whole', 'prefix'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_init_cfg_loads_published_files_as_they_are(family, layout, prefix):
    path = getattr(family, layout)
    backbone = family.build(init_cfg={'type': 'Pretrained', 'checkpoint': path, **prefix})
    backbone.init_weights()
    assert_holds(backbone, path)


@each_family
def test_pretrained_is_short_for_init_cfg(family):
    detector = Detector(family, pretrained=family.classification)
    detector.init_weights()
    assert_holds(detector.backbone, family.classification)


@each_golden_set
@pytest.mark.parametrize('layout', LAYOUTS)
def test_load_from_loads_published_files_as_they_are(family, layout):
    detector, path = Detector(family), getattr(family, layout)
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


@pytest.mark.parametrize('content', [{}, {'state_dict': {}, 'meta': {}}])
@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_file_without_tensors_raises(tmp_path, content, route):
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r'other\.pth matches nothing: expected 206 tensors'):
        load(route, path)


@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_file_that_is_no_checkpoint_raises(tmp_path, route):
    path = tmp_path / 'other.pth'
    torch.save([1, 2], path)
    with pytest.raises(RuntimeError, match=r'No state_dict found in checkpoint file .*other\.pth'):
        load(route, path)


@pytest.mark.parametrize('layout', ['state_dict', 'model', None])
@pytest.mark.parametrize('route', ['init_cfg', 'load_from'])
def test_a_file_that_matches_nothing_raises(tmp_path, route, layout):
    path = tmp_path / 'resnet.pth'
    prefix = 'backbone.' if route == 'load_from' else ''
    state = {f'{prefix}conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.bias': torch.zeros(1000)}
    torch.save({layout: state} if layout else state, path)
    if route == 'load_from' and layout == 'model':  # where MMEngine does not look
        state['backbone.stages.0.blocks.0.ssm.state_fusion.dwconv_d3'] = torch.zeros(1)
        torch.save({layout: state}, path)
    with pytest.raises(RuntimeError, match=r'resnet\.pth matches nothing: expected 206 tensors'):
        load(route, path)


def test_a_file_of_the_backbone_alone_is_not_taken_for_one_of_the_rest(tmp_path):
    path = tmp_path / 'backbone.pth'
    torch.save(SpatialMamba(ARCH).state_dict(), path)
    with pytest.raises(RuntimeError, match=r'backbone\.pth matches nothing.* is loaded by init_cfg=dict'):
        load('load_from', path)


@pytest.fixture
def log(caplog):
    """The messages of MMEngine's current logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('layout', ['state_dict', None])
def test_a_file_without_the_backbone_is_loaded_for_the_rest_and_says_so_loudly(tmp_path, layout, log):
    path, detector = tmp_path / 'heads.pth', Detector()
    state = {'head.weight': torch.full((2, 2), 3.0), 'neck.conv.weight': torch.zeros(1)}
    torch.save({layout: state} if layout else state, path)
    before = copy.deepcopy(detector.backbone.state_dict())
    load_checkpoint(detector, str(path))
    assert (detector.head.weight == 3).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.backbone.state_dict().items())
    (record,) = (record for record in log.records if 'THE BACKBONE KEEPS' in record.getMessage())
    assert record.levelno == logging.WARNING
    assert f'SpatialMamba: {path} has no tensor under backbone.' in record.getMessage()


def test_a_file_of_one_of_two_branches_is_loaded(tmp_path, log):
    path = tmp_path / 'rgb.pth'
    torch.save({'state_dict': {f'rgb.{name}': value for name, value in SpatialMamba(ARCH).state_dict().items()}}, path)
    model = torch.nn.ModuleDict({'rgb': SpatialMamba(ARCH), 'thermal': SpatialMamba(ARCH)})
    load_checkpoint(model, str(path))
    saved = torch.load(path, weights_only=True)['state_dict']
    assert all(torch.equal(tensor, saved[f'rgb.{name}']) for name, tensor in model['rgb'].state_dict().items())
    assert f'{path} has no tensor under thermal.' in log.text


WRAPPINGS = {
    'bare': lambda state: state,
    'state_dict': lambda state: {'state_dict': state, 'meta': {'epoch': 3}},
    'model': lambda state: {'model': state, 'meta': {'epoch': 3}},
}


@each_family
@pytest.mark.parametrize('prefix', ['', 'module.', 'module.module.'])
@pytest.mark.parametrize('names', ['own', 'official'])
@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_however_a_detector_was_saved_it_loads(tmp_path, wrapping, names, prefix, family):
    path, saved = tmp_path / 'detector.pth', Detector(family)
    with torch.no_grad():
        for tensor in saved.parameters():
            tensor.normal_()
    state = saved.state_dict()
    for name in list(state):
        part, _, rest = name.partition('.')
        value = state.pop(name)
        if part == 'backbone' and names == 'official':
            value = family.names.to_official_value(rest, value)
            rest = family.names.to_official(rest)
        state[f'{prefix}{part}.{rest}'] = value
    torch.save(WRAPPINGS[wrapping](state), path)
    whole, alone, prefixed = (
        Detector(family),
        family.build(pretrained=str(path)),
        family.build(init_cfg={'type': 'Pretrained', 'checkpoint': str(path), 'prefix': 'backbone'}),
    )
    load_checkpoint(whole, str(path))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name
    for backbone in (alone, prefixed):
        backbone.init_weights()
        assert all(map(torch.equal, backbone.parameters(), saved.backbone.parameters()))
    if wrapping != 'bare':
        assert CheckpointLoader.load_checkpoint(str(path))['meta'] == {'epoch': 3}


def test_weights_of_mmengines_average_load(tmp_path):
    path, detector = tmp_path / 'ema.pth', Detector()
    torch.save(ExponentialMovingAverage(detector).state_dict(), path)  # module.… and steps
    other = Detector()
    load_checkpoint(other, str(path))
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), detector.parameters(), strict=True))


def test_quantized_weights_load_from_their_file(tmp_path):
    path = tmp_path / 'quantized.pth'
    models = [quantize_dynamic(Detector().eval(), {torch.nn.Linear}) for _ in range(2)]
    torch.save(models[0].state_dict(), path)
    load_checkpoint(models[1], str(path))
    x = torch.rand(1, 3, 40, 32)
    for one, other in zip(*(model.backbone(x) for model in models), strict=True):
        assert torch.equal(one, other)


class Foreign(BaseModule):
    """A network of somebody else, with a child of the name that one of ours has too."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleDict({'0': torch.nn.ModuleDict({'state_fusion': torch.nn.Linear(2, 2)})})
        self.state_fusion = torch.nn.Linear(2, 2)
        self.norm = torch.nn.LayerNorm(2)
        self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize('wrapping', ['bare', 'state_dict'])
def test_a_foreign_model_with_a_child_called_state_fusion_loads(tmp_path, wrapping):
    path, saved, model = tmp_path / 'foreign.pth', Foreign(), Foreign()
    torch.save(WRAPPINGS[wrapping](saved.state_dict()), path)
    load_checkpoint(model, str(path), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])


FOREIGN_CONTENTS = {
    'tensor': torch.arange(3),
    'list': [1, {'a': torch.ones(2)}],
    'number': 3,
    'text': 'state_dict',
    'none': None,
    'numbers': {1: 'a', ('b', 2): 3},
    'no weights': {'meta': {'epoch': 1}, 'history': [0.5]},
    'no names': {'state_dict': [torch.ones(1)], 'model': 'resnet50'},
    'names and numbers': {'state_dict': {0: torch.ones(1), 'a': torch.ones(1)}},
    'module': {'module.weight': torch.ones(1)},
    'model': {'model': {'module.weight': torch.ones(1)}, 'epoch': 1},
    'published swin': {'model': {'layers.0.blocks.0.norm1.weight': torch.ones(1), 'norm.weight': torch.ones(1)}},
}


def equal(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize('name', FOREIGN_CONTENTS)
def test_a_file_that_holds_no_backbone_of_ours_is_read_as_without_this_package(tmp_path, name):
    path, content = str(tmp_path / 'file.pth'), FOREIGN_CONTENTS[name]
    torch.save(content, path)
    assert equal(CheckpointLoader.load_checkpoint(path), content)
    assert equal(mmengine_checkpoint.load_from_local(path, 'cpu'), content)


def test_what_mmengine_refuses_is_refused_with_an_error_of_the_same_kind(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save({'payload': TakesAnAttribute(torch.nn.Linear, 'forward')}, path)
    readers = [CheckpointLoader.load_checkpoint]
    if VERSION >= (2, 6):  # where torch.load, by which MMEngine reads, is weights_only unless told otherwise
        readers.append(partial(mmengine_checkpoint.load_from_local, map_location='cpu'))
    for read in readers:
        with pytest.raises(pickle.UnpicklingError):
            read(path)


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
