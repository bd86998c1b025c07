"""Downloads: one file for each address, the hash in a name, damaged files, and failures on every rank."""

import hashlib
import subprocess
import sys
import textwrap
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba import download
from mmspatialmamba.checkpoint import CheckpointError


class Served:
    """A folder that a server shows.

    Attributes:
        folder: The folder.
        address: Its address.
    """

    def __init__(self, folder, port):
        self.folder, self.address = folder, f'http://127.0.0.1:{port}'

    def write(self, name, value):
        return write(self.folder / name, value)

    def read(self, name):
        return CheckpointLoader.load_checkpoint(f'{self.address}/{name}')['state_dict']['a'].item()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A served folder, in a process of whose downloads nothing stays."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    folder = tmp_path / 'served'
    folder.mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Served(folder, server.server_port)
        server.shutdown()


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': {'a': torch.full((1,), float(value))}}, path)
    return path


def test_two_addresses_with_the_same_name_are_two_files(served):
    for value, folder in enumerate(('one', 'two')):
        served.write(f'{folder}/model.pth', value)
    assert [served.read('one/model.pth'), served.read('two/model.pth'), served.read('one/model.pth')] == [0, 1, 0]
    for path in list(served.folder.rglob('*.pth')):
        path.unlink()
    assert [served.read('one/model.pth'), served.read('two/model.pth')] == [0, 1]  # from the folder of downloads


def named_by_hash(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f'{path.stem}-{digest}.pth'))


def test_a_name_with_a_hash_lies_where_torch_hub_puts_it_and_is_checked(served, tmp_path):
    path = named_by_hash(served.write('model.pth', 3))
    assert served.read(path.name) == 3
    cached = tmp_path / 'home' / 'hub' / 'checkpoints' / path.name
    assert cached.is_file()
    write(cached, 4)
    with pytest.raises(
        CheckpointError, match=rf'an intact file at {cached}, found another one: its name .*; delete it'
    ):
        served.read(path.name)


def test_a_download_of_another_content_than_its_name_says_raises(served, tmp_path):
    served.write('model-01234567.pth', 1)
    with pytest.raises(CheckpointError, match=r'model-01234567\.pth: expected .* invalid hash value'):
        served.read('model-01234567.pth')
    assert not list((tmp_path / 'home').rglob('*.pth'))


@pytest.mark.parametrize('name', ['model-20240131.pth', 'model-12.pth', 'model-release.pth', '01234567.pth'])
def test_a_name_without_a_hash_is_not_checked(served, name):
    served.write(name, 5)
    assert served.read(name) == 5


def test_a_damaged_file_is_named_by_its_path(served, tmp_path):
    served.write('model.pth', 1)
    served.read('model.pth')
    (cached,) = (tmp_path / 'home').rglob('model.pth')
    cached.write_bytes(cached.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=rf'model\.pth: expected a checkpoint .* It lies at {cached}: delete it'):
        served.read('model.pth')


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    address = 'http://127.0.0.1:9/model.pth'
    with pytest.raises(CheckpointError, match=f'put the file there by hand: {download.cached(address)}'):
        CheckpointLoader.load_checkpoint(address)
    write(download.cached(address), 6)
    assert CheckpointLoader.load_checkpoint(address)['state_dict']['a'] == 6


def test_what_fails_on_rank_0_raises_on_the_others(monkeypatch):
    def broadcast(failures):
        failures[0] = 'URLError: no network'

    monkeypatch.setattr(download.dist, 'get_rank', lambda: 1)
    monkeypatch.setattr(download.dist, 'broadcast_object_list', broadcast)
    with pytest.raises(download.DownloadError, match='URLError: no network'):
        download.on_every_rank(lambda: pytest.fail('it is to wait for rank 0'))


TWO_RANKS = """
    import datetime, os, sys
    import torch.distributed as dist
    import mmspatialmamba
    from mmengine.runner.checkpoint import CheckpointLoader

    rank, store, address, home = int(sys.argv[1]), *sys.argv[2:]
    os.environ['TORCH_HOME'] = f'{home}/{rank}'  # as on two nodes
    dist.init_process_group('gloo', f'file://{store}', datetime.timedelta(seconds=60), rank=rank, world_size=2)
    for name in ('good.pth', 'missing.pth'):
        try:
            print(CheckpointLoader.load_checkpoint(f'{address}/{name}')['state_dict']['a'].item())
        except RuntimeError as error:
            print('404' in str(error))
"""


@pytest.mark.end_to_end
def test_two_ranks(served, tmp_path):
    served.write('good.pth', 2)
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(TWO_RANKS)]
    arguments = [str(tmp_path / 'store'), served.address, str(tmp_path / 'homes')]
    ranks = [subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    for rank in ranks:
        output = rank.communicate(timeout=250)[0]
        assert [line for line in output.splitlines() if 'mmengine' not in line] == ['2.0', 'True']
