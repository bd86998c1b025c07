"""Published weights by name: from a server that behaves as Google Drive does, from a folder, offline, on every rank."""

import hashlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from drive_server import route, serve_drive, sitecustomize
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba import SpatialMamba, VMamba, config_path, download, published
from mmspatialmamba.checkpoint import CheckpointError, read
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA
from mmspatialmamba.models import backbone as backbone_module

PUBLISHED_FILE = Path(__file__).parent / 'data' / 'official_small_classification.pth'
ARCH = {'embed_dims': 16, 'depths': (1, 1, 2, 1)}  # of this file
NAME = 'spatialmamba://cls_sm_t'
ID = '19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW'
PAGE = f'https://drive.google.com/file/d/{ID}/view'
ORIGINAL_NAME = 'original name.pth'


@pytest.fixture(autouse=True)
def nothing_downloaded(tmp_path, monkeypatch):
    """A process of whose downloads nothing stays, and to which no folder of weights is named."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv(published.FOLDER_VARIABLE, raising=False)


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """The server, with the weights of cls_sm_t."""
    import gdown

    monkeypatch.setattr(sys.modules[gdown.download.__module__], 'DEFAULT_COOKIES_FILE', str(tmp_path / 'cookies.txt'))
    with serve_drive() as drive:
        drive.files[ID] = (ORIGINAL_NAME, PUBLISHED_FILE.read_bytes())
        route(drive, monkeypatch.setattr)
        yield drive


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the environment variable names."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture
def metafile(monkeypatch, tmp_path):
    """Changes the metafile: a function that takes what to set in the entry of cls_sm_t, and entries to add."""

    def change(changes=None, added=()):
        content = yaml.safe_load(Path(config_path('metafile.yml')).read_text())
        content['Models'][0].update(changes or {})
        content['Models'] += added
        path = tmp_path / 'metafile.yml'
        path.write_text(yaml.safe_dump(content))
        monkeypatch.setattr(published, 'config_path', lambda name: str(path))
        published.published_models.cache_clear()

    yield change
    published.published_models.cache_clear()


def is_published(checkpoint):
    """Whether a checkpoint holds the tensors of the published file, under the names of a model of a toolbox."""
    expected, found = torch.load(PUBLISHED_FILE, weights_only=True)['model'], checkpoint['state_dict']
    names = {SPATIAL_MAMBA.to_toolbox(name): name for name in expected}
    return found.keys() == names.keys() and all(torch.equal(found[own], expected[name]) for own, name in names.items())


def assert_loads():
    assert is_published(CheckpointLoader.load_checkpoint(NAME))


def downloaded(tmp_path):
    return [path for path in (tmp_path / 'home').rglob('*') if path.is_file() and not path.name.startswith('.')]


def test_pretrained_takes_a_name(drive, tmp_path):
    backbone = SpatialMamba(ARCH, pretrained=NAME)
    backbone.init_weights()
    expected = torch.load(PUBLISHED_FILE, weights_only=True)['model']['layers.0.blocks.0.ln_1.weight']
    assert torch.equal(backbone.stages[0].blocks[0].norm1.weight, expected)
    assert [path.name for path in downloaded(tmp_path)] == [ORIGINAL_NAME]


def test_the_file_is_downloaded_once_and_logged_with_its_hash(drive, caplog, capsys):
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, 'print_log', lambda message, **_: messages.append(message))
        for _ in range(2):
            assert_loads()
    assert drive.requests == [(ID, 0)]
    (message,) = messages
    assert ORIGINAL_NAME in message
    assert hashlib.sha256(PUBLISHED_FILE.read_bytes()).hexdigest() in message
    assert '100%' in capsys.readouterr().err


def test_addresses_of_google_drive_load_too(drive):
    for address in (PAGE, f'https://drive.google.com/uc?id={ID}&export=download'):
        assert is_published(CheckpointLoader.load_checkpoint(address))
    assert drive.requests == [(ID, 0)]


def refusal():
    """What loading raises; it names the page, the file and the folder in one line."""
    with pytest.raises(CheckpointError) as raised:
        CheckpointLoader.load_checkpoint(NAME)
    text = str(raised.value)
    assert '\n' not in text
    assert re.match(rf'{NAME}: expected its weights, found none .* By hand: download {PAGE} .* as cls_sm_t\.pth', text)
    assert str(download.cached(PAGE)) in text
    return text


def test_a_file_over_its_quota(drive, tmp_path):
    drive.over_quota.add(ID)
    assert 'Google Drive does not give the file out' in (text := refusal())
    assert 'Too many users have viewed or downloaded this file recently' in text
    assert not downloaded(tmp_path)
    drive.over_quota.clear()
    assert_loads()


def test_a_private_file(drive, tmp_path):
    drive.files.clear()
    assert 'Google Drive does not give the file out' in (text := refusal())
    assert 'permission' in text
    assert not downloaded(tmp_path)


def test_without_a_network(drive, folder, monkeypatch):
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCH_HOME', str(folder.parent / 'home'))
        patch.setenv(published.FOLDER_VARIABLE, str(folder))
        drive.address = 'http://127.0.0.1:9'
        route(drive, patch.setattr)
        assert f'into {folder}, which MMSPATIALMAMBA_WEIGHTS names' in (text := refusal())
        assert 'Connection refused' in text
        (folder / 'cls_sm_t.pth').write_bytes(PUBLISHED_FILE.read_bytes())
        assert_loads()


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda patch: patch.setitem(sys.modules, 'gdown', None), r'gdown.* pip install "gdown>=6\.5"'),
        (
            lambda patch: patch.setattr('gdown.__version__', '5.2.2'),
            r'found gdown 5\.2\.2, .* pip install "gdown>=6\.5"',
        ),
    ],
    ids=['missing', 'too old'],
)
def test_without_gdown_the_error_says_the_command(drive, monkeypatch, spoil, message):
    spoil(monkeypatch)
    assert re.search(message, refusal())


def test_the_extra_asks_for_the_gdown_that_the_error_names():
    requirements = Path(__file__).parents[1] / 'requirements'
    for name in ('weights', 'test'):
        assert download.GDOWN in (requirements / f'{name}.txt').read_text().splitlines()


CHUNK = 2**19  # what gdown writes at a time


@pytest.fixture
def large(drive, tmp_path):
    """The server, whose file is so large that a connection can break in it."""
    weights = torch.load(PUBLISHED_FILE, weights_only=True)
    torch.save({**weights, 'more': torch.rand(CHUNK)}, tmp_path / 'large.pth')
    drive.files[ID] = (ORIGINAL_NAME, (tmp_path / 'large.pth').read_bytes())
    drive.broken_after = CHUNK + 5000
    return drive


def test_a_broken_connection_goes_on_where_it_was(large):
    large.breaks = 1
    assert_loads()
    assert large.requests == [(ID, 0), (ID, CHUNK)]


def test_an_interrupted_download_goes_on_in_the_next_call(large, tmp_path):
    large.breaks = 3  # as often as gdown tries
    assert 'incomplete' in refusal()
    assert [path.suffix for path in downloaded(tmp_path)] == ['.part']
    assert_loads()
    assert large.requests[-1] == (ID, 3 * CHUNK)
    assert [path.name for path in downloaded(tmp_path)] == [ORIGINAL_NAME]


def test_an_unfinished_download_that_cannot_go_on_is_named(drive, tmp_path):
    """The file has changed since, or all of it is there, so the server has nothing to add."""
    folder = download.cached(PAGE)
    folder.mkdir(parents=True)
    part = folder / f'{ORIGINAL_NAME}12345678.part'
    part.write_bytes(PUBLISHED_FILE.read_bytes())
    assert f'unfinished, delete it to begin anew: {part}' in refusal()
    part.unlink()
    assert_loads()


def test_a_damaged_download_is_named_by_its_path(drive, tmp_path):
    assert_loads()
    (path,) = downloaded(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=rf'{NAME}: expected a checkpoint .* It lies at {path}: delete it'):
        assert_loads()


def test_a_hash_in_the_metafile_is_checked(drive, metafile, tmp_path):
    metafile({'SHA256': hashlib.sha256(PUBLISHED_FILE.read_bytes()).hexdigest()})
    assert_loads()
    (path,) = downloaded(tmp_path)
    torch.save({'model': {}}, path)
    assert f'an intact file at {path}, found another one: the metafile says' in refusal()
    path.unlink()
    metafile({'SHA256': '0123456789'})
    assert 'begins with 0123456789, found' in refusal()
    assert not downloaded(tmp_path)


@pytest.mark.parametrize(
    'name', ['cls_sm_t.pth', 'cls_sm_t.safetensors', 'cls_sm_t/its own name.pth', 'published.pth', 'hash']
)
def test_a_file_put_by_hand_serves(drive, folder, metafile, name):
    metafile({'File': 'published.pth'})
    weights = torch.load(PUBLISHED_FILE, weights_only=True)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == '.safetensors':
        from safetensors.torch import save_file

        save_file(weights['model'], path)
    else:
        torch.save(weights, path)
    if name == 'hash':
        path.rename(folder / f'cls_sm_t-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth')
    (folder / 'cls_sm_tt.pth').touch()  # another model
    assert_loads()
    assert drive.requests == []


def test_a_folder_without_the_file_leaves_it_to_the_download(drive, folder):
    (folder / 'cls_sm_s.pth').touch()
    assert_loads()
    assert drive.requests == [(ID, 0)]


def test_two_files_put_by_hand_are_one_too_many(drive, folder):
    for name in ('cls_sm_t.pth', 'cls_sm_t.safetensors'):
        (folder / name).touch()
    assert re.search(r'expected one file of cls_sm_t, found .*cls_sm_t\.pth, .*cls_sm_t\.safetensors', refusal())


def test_a_folder_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(tmp_path / 'mistyped'))
    assert f'MMSPATIALMAMBA_WEIGHTS: expected a folder, found none at {tmp_path / "mistyped"}' in refusal()


def test_a_name_that_is_none():
    with pytest.raises(CheckpointError, match=r'spatialmamba://cls_sm_x: expected .* which are cls_sm_t, cls_sm_s, '):
        CheckpointLoader.load_checkpoint('spatialmamba://cls_sm_x')


def test_tools_read_by_name(drive):
    assert 'model' in read(NAME)


def test_every_model_of_the_metafile_has_a_name():
    models = published.published_models()
    assert len(models) == len(yaml.safe_load(Path(config_path('metafile.yml')).read_text())['Models'])
    for name, model in models.items():
        assert name.partition('://')[0] in published.SCHEMES
        assert Path(config_path(model.config)).is_file()
        assert model.metrics
        assert model.address.startswith('https://')


def test_vmambas_weights_are_files_of_releases():
    model = published.find_model('vmamba://cls_vmamba_s')
    assert model.address.startswith('https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/')
    assert model.file == 'vssm_small_0229_ckpt_epoch_222.pth'
    assert model.sha256 == 'c540366e366d81acf69251810e7ea7268e0ca8bcb6843f3b773c1f0105bd30cb'


@pytest.mark.parametrize(
    ('arch', 'name'),
    [('tiny', 'vmamba://cls_vmamba_t'), ('b', 'vmamba://cls_vmamba_b'), ('tiny_s2l5', None), ('base_s1l20', None)],
)
def test_the_recipe_names_the_weights_of_the_architecture(arch, name):
    with torch.device('meta'):
        assert VMamba(arch)._published_weights() == name
        assert VMamba(arch, in_channels=4)._published_weights() is None


def test_another_backbone_is_a_scheme_of_its_own(metafile, folder, monkeypatch):
    entry = {
        'Name': 'mask_rcnn_other_t',
        'In Collection': 'other-mamba',
        'Config': 'configs/mask_rcnn_sm_t.py',
        'Results': [{'Metrics': {'box AP': 40.0}}],
        'Weights': 'https://127.0.0.1:9/releases/%23v2/weights.pth',
        'SHA256': hashlib.sha256(PUBLISHED_FILE.read_bytes()).hexdigest(),
    }
    metafile(added=[entry])
    model = published.find_model('othermamba://mask_rcnn_other_t')
    assert model.file == 'weights.pth'
    with pytest.raises(download.DownloadError, match=r'othermamba://mask_rcnn_other_t: .* as weights\.pth into'):
        published.find_weights(model)
    place = download.cached(entry['Weights'])
    place.write_bytes(PUBLISHED_FILE.read_bytes())
    assert published.find_weights(model) == place
    (folder / 'weights.pth').write_bytes(PUBLISHED_FILE.read_bytes())
    assert published.find_weights(model) == folder / 'weights.pth'


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({}, NAME),
        ({'arch': 'base'}, 'spatialmamba://cls_sm_b'),
        ({'arch': {'embed_dims': 64, 'depths': [2, 4, 21, 5]}}, 'spatialmamba://cls_sm_s'),
        ({'arch': ARCH}, None),
        ({'in_channels': 4}, None),
    ],
)
def test_the_log_about_random_weights_names_the_published_ones(arguments, expected, monkeypatch):
    messages = []
    monkeypatch.setattr(backbone_module, 'print_log', lambda message, **_: messages.append(message))
    backbone = SpatialMamba(**arguments)
    monkeypatch.setattr(backbone_module.BaseModule, 'init_weights', lambda self: None)  # a line for each parameter
    backbone.init_weights()
    (message,) = messages
    assert 'random weights' in message
    assert re.findall(r'\w+://\w+', message) == ([expected] if expected else [])


RANK = """
    import datetime, sys
    import torch.distributed as dist
    import mmspatialmamba
    from mmengine.runner.checkpoint import CheckpointLoader

    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group('gloo', f'file://{store}', datetime.timedelta(seconds=60), rank=rank, world_size=2)
    for name in ('cls_sm_t', 'cls_sm_s'):
        try:
            print(len(CheckpointLoader.load_checkpoint(f'spatialmamba://{name}')['state_dict']))
        except RuntimeError as error:
            print('Google Drive does not give the file out' in str(error))
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize('case', ['one node', 'two nodes', 'a file put by hand on one node'])
def test_two_ranks(case, drive, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(sitecustomize(drive))
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(RANK)]
    ranks = []
    for rank in (0, 1):
        home, weights = tmp_path / (str(rank) if case != 'one node' else 'shared'), tmp_path / f'weights{rank}'
        weights.mkdir()
        environment = {**os.environ, 'PYTHONPATH': str(tmp_path), 'HOME': str(home), 'TORCH_HOME': str(home)}
        environment[published.FOLDER_VARIABLE] = str(weights)
        if case.startswith('a file') and rank == 0:
            (weights / 'cls_sm_t.pth').write_bytes(PUBLISHED_FILE.read_bytes())
        ranks.append(
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / 'store')], stdout=subprocess.PIPE, text=True, env=environment
            )
        )
    expected = str(len(torch.load(PUBLISHED_FILE, weights_only=True)['model']))
    for rank in ranks:
        output = rank.communicate(timeout=250)[0]
        assert [line for line in output.splitlines() if 'mmengine' not in line] == [expected, 'True']
    assert drive.requests == [(ID, 0)] * (2 if case == 'two nodes' else 1)
