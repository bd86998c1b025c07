"""The conversion tool: round trips of published files, stems, EMA weights, file names; files with a yacs config."""

import copy
import hashlib
import os
import re
import subprocess
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
import torchvision_setup  # noqa: F401
from families import FAMILIES, each_golden_set
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from tool_runner import load_tool

from mmspatialmamba import SpatialMamba, swap_backbone
from mmspatialmamba.checkpoint import CheckpointError, load_from_local, read

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'convert_checkpoint.py'
SPATIAL, VMAMBA = FAMILIES[:2]
CLASSIFICATION, DETECTOR, ARCH = Path(SPATIAL.classification), Path(SPATIAL.detector), SPATIAL.arch
EACH_FILE = [(family, layout) for family in FAMILIES for layout in ('classification', 'detector')]
each_file = pytest.mark.parametrize(('family', 'layout'), EACH_FILE, ids=lambda value: getattr(value, 'files', value))

convert_checkpoint = load_tool('convert_checkpoint')


@pytest.fixture
def detector_file(tmp_path):
    """A file as MMEngine writes it in training: official names, a head, and what training stores."""
    state = OrderedDict(torch.load(DETECTOR, weights_only=True)['state_dict'])
    for name in ('rpn_head.rpn_conv.weight', 'roi_head.norm.weight', 'neck.layers.0.ln_1.weight'):
        state[name] = torch.randn(3)
    state._metadata = {'': {'version': 1}, 'backbone.patch_embed.conv1': {'version': 2}, 'neck': {'version': 3}}
    path = tmp_path / 'detector.pth'
    torch.save({'meta': {'epoch': 12}, 'state_dict': state, 'optimizer': {'param_groups': []}, 'message_hub': {}}, path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool and returns the file that it wrote."""

    def run_main(*args):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
        convert_checkpoint.main()
        return Path(re.search(r'wrote (\S+):', capsys.readouterr().out).group(1))

    return run_main


@each_golden_set
def test_round_trip_of_a_published_classification_file(family, run, tmp_path):
    own = run(family.classification, tmp_path / 'own.pth')
    weights = load(own)['state_dict']
    assert {f'backbone.{family.names.stem}', 'backbone.out_norms.3.bias', 'head.fc.weight'} <= weights.keys()
    back = run(own, tmp_path / 'back.pth', '--names', 'official')
    assert load(back).keys() == {'model'}
    assert_same_weights(load(back)['model'], load(family.classification)['model'])


@each_golden_set
def test_round_trip_of_a_published_detector(family):
    published = load(family.detector)
    own = convert_checkpoint.convert(published)
    prefix = 'backbone.'
    assert {name.removeprefix(prefix) for name in own['state_dict']} == set(family.build().state_dict())
    assert_same_weights(convert_checkpoint.convert(own, names='official')['state_dict'], published['state_dict'])


def test_round_trip_of_a_published_detector_file(detector_file, tmp_path):
    published = load(detector_file)
    own = convert_checkpoint.convert(published)
    assert own.keys() == {'meta', 'state_dict'}
    weights = own['state_dict']
    for name in ('backbone.out_norms.0.weight', 'backbone.stages.0.blocks.0.ssm.A_log', 'neck.layers.0.ln_1.weight'):
        assert name in weights
    assert weights._metadata['backbone.stem.reduce'] == {'version': 2}
    back = convert_checkpoint.convert(own, names='official')
    assert back['meta'] == published['meta']
    assert_same_weights(back['state_dict'], published['state_dict'])
    assert back['state_dict']._metadata == published['state_dict']._metadata


@pytest.mark.parametrize('names', ['own', 'official'])
@each_file
def test_conversion_of_what_is_converted_already_changes_nothing(family, layout, names):
    once = convert_checkpoint.convert(load(getattr(family, layout)), names=names)
    twice = convert_checkpoint.convert(once, names=names)
    assert once.keys() == twice.keys()
    assert_same_weights(convert_checkpoint.get_weights(twice), convert_checkpoint.get_weights(once))


def test_a_converted_classifier_is_an_image_classifier():
    weights = convert_checkpoint.convert(load(CLASSIFICATION))['state_dict']
    classes, channels = weights['head.fc.weight'].shape
    config = {
        'type': 'ImageClassifier',
        'backbone': {'type': 'mmspatialmamba.SpatialMamba', 'arch': ARCH, 'out_indices': (3,)},
        'neck': {'type': 'GlobalAveragePooling'},
        'head': {'type': 'LinearClsHead', 'num_classes': classes, 'in_channels': channels},
    }
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config).eval()
        model.load_state_dict(weights)
        published = copy.deepcopy(model)
        published.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
        load_checkpoint(published, str(CLASSIFICATION))
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(model(image), published(image))


@each_file
@pytest.mark.parametrize('names', ['own', 'official'])
def test_backbone_alone_loads_as_the_whole_file_does(family, layout, names, tmp_path):
    path = getattr(family, layout)
    result = convert_checkpoint.convert(load(path), names=names, backbone=True)
    assert result.keys() == {'state_dict'}
    assert not any(name.startswith(('backbone.', 'head.')) for name in result['state_dict'])
    extracted = tmp_path / 'backbone.pth'
    torch.save(result, extracted)
    models = []
    for checkpoint in (extracted, path):
        models.append(family.build(out_indices=(3,), pretrained=str(checkpoint)))
        models[-1].init_weights()
    assert_same_weights(*(model.state_dict() for model in models))
    assert_same_weights(
        convert_checkpoint.convert(result, backbone=True)['state_dict'],
        convert_checkpoint.convert(load(path), backbone=True)['state_dict'],
    )


@pytest.mark.parametrize('in_channels', [1, 2, 3, 4, 7])
@each_file
def test_a_stem_of_other_channels_gives_equal_channels_the_same_response(family, layout, in_channels):
    path = getattr(family, layout)
    weights = convert_checkpoint.convert(load(path), in_channels=in_channels, backbone=True)['state_dict']
    before = family.build(out_indices=(3,)).eval()
    after = family.build(out_indices=(3,), in_channels=in_channels).eval()
    before.load_state_dict(convert_checkpoint.convert(load(path), backbone=True)['state_dict'], strict=False)
    after.load_state_dict(weights, strict=False)
    grey = torch.rand(1, 1, 32, 32)
    expected = before.stem(grey.expand(-1, 3, -1, -1))
    # float32: 2.4e-7 measured
    assert torch.allclose(after.stem(grey.expand(-1, in_channels, -1, -1)), expected, rtol=0, atol=3e-6)
    assert expected.abs().max() > 0.1


def test_linear_weights_that_are_kernels_become_matrices(run, tmp_path):
    state = load(VMAMBA.classification)['model']
    layers = ('in_proj.weight', 'out_proj.weight', 'fc1.weight', 'fc2.weight', 'head.weight')
    kernels = {name: value[:, :, None, None] if name.endswith(layers) else value for name, value in state.items()}
    path = tmp_path / 'kernels.pth'
    torch.save({'model': kernels}, path)
    own = run(path, tmp_path / 'own.pth')
    assert_same_weights(load(own)['state_dict'], convert_checkpoint.convert({'model': state})['state_dict'])
    read = load_from_local(str(path))['state_dict']
    assert read['head.fc.weight'].shape == state['classifier.head.weight'].shape


def test_a_relative_of_vmamba_is_refused():
    state = load(VMAMBA.classification)['model']
    state['layers.0.blocks.0.op.A_logs'] = state['layers.0.blocks.0.op.A_logs'].expand(-1, 16)
    with pytest.raises(convert_checkpoint.ConversionError, match='another VMamba, with state size 16'):
        convert_checkpoint.convert({'model': state})


def test_more_channels_keep_the_first_kernels():
    kernel = torch.randn(4, 3, 3, 3)
    adapted = convert_checkpoint.adapt_stem(kernel, 5)
    assert torch.equal(adapted[:, :3], kernel * 0.6)
    assert torch.allclose(adapted[:, 3:], kernel.mean(1, keepdim=True).expand(-1, 2, -1, -1) * 0.6)
    assert torch.equal(convert_checkpoint.adapt_stem(kernel, 3), kernel)


def test_bgr_reverses_the_first_three_channels():
    kernel = torch.randn(4, 3, 3, 3)
    assert torch.equal(convert_checkpoint.adapt_stem(kernel, 3, bgr=True), kernel.flip(1))
    adapted, plain = (convert_checkpoint.adapt_stem(kernel, 4, bgr=bgr) for bgr in (True, False))
    assert torch.equal(adapted[:, :3], plain[:, [2, 1, 0]])
    assert torch.allclose(adapted[:, 3], plain[:, 3])
    with pytest.raises(convert_checkpoint.ConversionError, match='at least 3 new ones, found 3 and 2'):
        convert_checkpoint.adapt_stem(kernel, 2, bgr=True)


class Detector(torch.nn.Module):
    """A backbone and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = SpatialMamba(ARCH)
        self.head = torch.nn.Linear(2, 2)


def test_ema_weights_of_mmengines_hook():
    hook, model = EMAHook(momentum=0.5), Detector()
    hook.before_run(types.SimpleNamespace(model=model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    hook.ema_model.update_parameters(model)  # the first update copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    hook.ema_model.update_parameters(model)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in hook.ema_model.module.state_dict().items()}
    assert not torch.equal(trained['head.weight'], averaged['head.weight'])
    checkpoint = {'state_dict': model.state_dict()}
    hook.before_save_checkpoint(None, checkpoint)
    for kind, expected in (('ema', averaged), ('trained', trained), (None, averaged)):
        assert_same_weights(convert_checkpoint.convert(checkpoint, kind=kind)['state_dict'], expected)


def test_ema_weights_of_the_original_project():
    trained = load(CLASSIFICATION)['model']
    averaged = {name: tensor + 1 for name, tensor in trained.items()}
    checkpoint = {'model': trained, 'model_ema': averaged, 'epoch': 300}
    for kind, expected in (('ema', averaged), ('trained', trained), (None, trained)):
        result = convert_checkpoint.convert(checkpoint, names='official', kind=kind)
        assert result.keys() == {'model'}
        assert_same_weights(result['model'], expected)


def test_the_name_holds_the_hash_of_the_file_and_depends_on_the_content_only(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(DETECTOR, 'first.pth')
    second = run(DETECTOR, tmp_path / 'folder' / 'second.pth')
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert (str(first), second.name) == (f'first-{digest[:8]}.pth', f'second-{digest[:8]}.pth')
    assert os.listdir(second.parent) == [second.name]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('none.pth', 'out.pth'), 'none.pth: expected a checkpoint file, found no such file'),
        ((DETECTOR, 'out.bin'), 'argument target: expected a name that ends in .pth or .safetensors, got out.bin'),
        ((DETECTOR, 'out.pth', '--in-channels', '0'), 'argument --in-channels: expected at least 1, got 0'),
        ((DETECTOR, 'out.pth', '--weights', 'ema'), 'official_small_detector.pth: expected averaged weights'),
        ((TOOL, 'out.pth'), 'convert_checkpoint.py: expected a checkpoint'),
        (('resnet.pth', 'out.pth'), 'resnet.pth: expected the weights of a backbone of mmspatialmamba, under own or'),
    ],
)
def test_what_cannot_be_converted_is_one_line(args, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)}}, 'resnet.pth')
    with pytest.raises(SystemExit) as stop:
        run(*args)
    # argparse prints its line itself; what main gives to sys.exit is printed by Python.
    (line,) = (capsys.readouterr().err if stop.value.code == 2 else stop.value.code).splitlines()[-1:]
    assert message in line
    assert not list(tmp_path.glob('out*'))


def test_safetensors_are_written_and_read_like_the_others(run, detector_file, tmp_path):
    pytest.importorskip('safetensors')
    pickled = run(detector_file, tmp_path / 'own.pth')
    written = run(detector_file, tmp_path / 'own.safetensors')
    assert written.name == f'own-{hashlib.sha256(written.read_bytes()).hexdigest()[:8]}.safetensors'
    assert run(detector_file, tmp_path / 'again' / 'own.safetensors').name == written.name
    one, other = (read(str(path)) for path in (pickled, written))
    assert one['meta'] == other['meta'] == {'epoch': 12}
    assert one['state_dict'].keys() == other['state_dict'].keys()
    assert all(torch.equal(tensor, other['state_dict'][name]) for name, tensor in one['state_dict'].items())
    back = run(written, tmp_path / 'official.safetensors', '--names', 'official', '--backbone')
    for path in (written, back):
        backbone = SpatialMamba(ARCH, pretrained=str(path))
        backbone.init_weights()
        expected = load(DETECTOR)['state_dict']['backbone.layers.0.blocks.0.ln_1.weight']
        assert torch.equal(backbone.stages[0].blocks[0].norm1.weight, expected)
    written.write_bytes(written.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf'{written.name}: expected a checkpoint written by'):
        read(str(written))


def test_a_classifier_in_safetensors_loads_as_a_model_of_a_toolbox(run, tmp_path):
    pytest.importorskip('safetensors')
    path = run(CLASSIFICATION, tmp_path / 'cls.safetensors', '--names', 'official')
    assert load_from_local(str(path))['state_dict'].keys() == load_from_local(str(CLASSIFICATION))['state_dict'].keys()


def test_safetensors_hold_no_more_than_tensors_and_json(tmp_path):
    pytest.importorskip('safetensors')
    state = {'a': torch.ones(1)}
    for content, message in (
        ({'state_dict': {**state, 'b': torch.qint8}}, 'expected tensors only, found a dtype as b'),
        ({'state_dict': state, 'meta': {'x': {1, 2}}}, 'expected meta data that JSON can hold, found a set'),
    ):
        with pytest.raises(convert_checkpoint.ConversionError, match=message):
            convert_checkpoint.save(content, tmp_path / 'x.safetensors')
    palette = convert_checkpoint.save(
        {'state_dict': state, 'meta': {'palette': np.array([[1, 2, 3]], np.uint8)}}, tmp_path / 'x.safetensors'
    )
    assert read(str(palette))['meta'] == {'palette': [[1, 2, 3]]}


def test_safetensors_keep_the_versions_of_modules(run, tmp_path):
    """Without one, VFNet's head takes its own names for those of an early version and loads none of them."""
    config = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs/vfnet/vfnet_r50_fpn_1x_coco.py')
    config.model.backbone.init_cfg = None
    config = swap_backbone(config, {'embed_dims': 16, 'depths': (1, 1, 1, 1)})
    with DefaultScope.overwrite_default_scope('mmdet'):
        trained, model = MODELS.build(config.model), MODELS.build(config.model)
    torch.save({'state_dict': trained.state_dict(), 'meta': {'epoch': 1}}, tmp_path / 'vfnet.pth')
    load_checkpoint(model, str(run(tmp_path / 'vfnet.pth', tmp_path / 'vfnet.safetensors')), strict=True)
    assert torch.equal(model.bbox_head.vfnet_cls.weight, trained.bbox_head.vfnet_cls.weight)


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    (tmp_path / 'x.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'x\.safetensors: .*safetensors.*pip install safetensors'):
        read(str(tmp_path / 'x.safetensors'))


def test_the_command_line():
    result = subprocess.run([sys.executable, str(TOOL), '--help'], capture_output=True, text=True, check=True)
    assert 'python tools/convert_checkpoint.py published.pth' in result.stdout
    assert '--in-channels' in result.stdout


class CfgNode(dict):
    """A dict with attributes, as ``yacs.config.CfgNode`` is."""

    def __init__(self, content):
        super().__init__(content)
        self.__dict__['__immutable__'] = True


@contextmanager
def yacs_installed(monkeypatch):
    """Lets `CfgNode` pickle under yacs's name."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', types.ModuleType('yacs.config'))
        patch.setattr(sys.modules['yacs.config'], 'CfgNode', CfgNode, raising=False)
        patch.setattr(CfgNode, '__module__', 'yacs.config')
        yield


@pytest.fixture
def yacs_file(tmp_path, monkeypatch):
    """A file of the original project's training, pickled under yacs's name; yacs is not importable afterwards."""
    path = tmp_path / 'ckpt_epoch_299.pth'
    config = CfgNode({'MODEL': CfgNode({'NAME': 'tiny', 'DROP_PATH_RATE': 0.2}), 'TAG': ['a', 1, None]})
    with yacs_installed(monkeypatch):
        torch.save({**load(CLASSIFICATION), 'optimizer': {'state': {}}, 'config': config, 'epoch': 299}, path)
    assert b'yacs.config' in path.read_bytes()
    monkeypatch.setitem(sys.modules, 'yacs', None)
    return path


def test_a_file_with_a_yacs_config_is_read(yacs_file, tmp_path):
    config = read(str(yacs_file))['config']
    assert config == {'MODEL': {'NAME': 'tiny', 'DROP_PATH_RATE': 0.2}, 'TAG': ['a', 1, None]}
    assert load_from_local(str(yacs_file)).keys() == {'state_dict', 'optimizer', 'config', 'epoch'}
    result = convert_checkpoint.convert(read(str(yacs_file)), names='official')
    assert_same_weights(result['model'], load(CLASSIFICATION)['model'])


def test_a_file_with_a_yacs_config_initializes_the_backbone(yacs_file):
    backbone = SpatialMamba(ARCH, pretrained=str(yacs_file))
    backbone.init_weights()
    expected = load(CLASSIFICATION)['model']['layers.0.blocks.0.ln_1.weight']
    assert torch.equal(backbone.stages[0].blocks[0].norm1.weight, expected)


def test_yacs_is_allowed_in_the_readers_only(yacs_file):
    read(str(yacs_file))
    with pytest.raises(Exception, match=r'yacs\.config'):
        load(yacs_file)


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch executed',)


def test_code_in_a_yacs_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with yacs_installed(monkeypatch):
        torch.save({'model': {'a': torch.zeros(1)}, 'config': CfgNode({'a': RunsCode()})}, 'hostile.pth')
    with pytest.raises(CheckpointError, match='not allowed'):
        read('hostile.pth')
    assert not (tmp_path / 'executed').exists()
