"""What a kill, a full disk, a damaged file and too little memory leave behind; `interrupted_training.py` trains."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba import SpatialMamba
from mmspatialmamba.checkpoint import CheckpointError

TRAINING = Path(__file__).with_name('interrupted_training.py')


def train(work_dir, how='never'):
    command = [sys.executable, '-W', 'ignore', TRAINING, work_dir, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def losses(work_dir):
    """The last loss logged for each step."""
    lines = [
        line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.read_text().splitlines()
    ]
    return {entry['step']: entry['loss'] for entry in map(json.loads, lines)}


def assert_same(one, other):
    """Two values out of checkpoints, bit by bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('uninterrupted')
    result = train(work_dir)
    assert result.returncode == 0, result.stderr
    return work_dir


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ('how', 'code', 'partial'),
    [('epoch', -signal.SIGKILL, False), ('write', -signal.SIGKILL, True), ('full', 1, True)],
    ids=['killed in an epoch', 'killed while it writes a checkpoint', 'full disk'],
)
def test_resumes_with_the_same_bits(uninterrupted, tmp_path, how, code, partial):
    """Weights, optimizer, schedule and losses equal those of a run that nothing interrupted."""
    interrupted = train(tmp_path, how)
    assert interrupted.returncode == code, interrupted.stderr
    if how == 'full':
        assert interrupted.stderr.rstrip().endswith('File too large')
    broken = tmp_path / 'epoch_3.pth'
    assert broken.exists() == partial
    if partial:
        with pytest.raises(CheckpointError, match=r'epoch_3\.pth: expected a checkpoint'):
            CheckpointLoader.load_checkpoint(str(broken))

    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert 'resumed epoch: 2, iter: 8' in resumed.stdout + resumed.stderr
    one, other = (CheckpointLoader.load_checkpoint(str(folder / 'epoch_4.pth')) for folder in (tmp_path, uninterrupted))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(one[part], other[part])
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'whole.pth'
    torch.manual_seed(0)
    torch.save({'state_dict': SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 1, 1)}).state_dict()}, path)
    return path


def test_flipped_bits_raise(checkpoint, tmp_path):
    """Of 500 files with one flipped bit each raises, unless the bit means nothing and all tensors are right."""
    content = checkpoint.read_bytes()
    expected = torch.load(checkpoint, weights_only=True)['state_dict']
    generator = random.Random(0)
    path = tmp_path / 'flipped.pth'
    messages = []
    for _ in range(500):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            state = CheckpointLoader.load_checkpoint(str(path))['state_dict']
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert_same(dict(state), dict(expected))
    assert len(messages) > 400
    assert all('flipped.pth: expected a checkpoint' in message for message in messages)


def test_files_cut_anywhere_raise(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    path = tmp_path / 'cut.pth'
    for part in range(100):
        path.write_bytes(content[: len(content) * part // 100])
        with pytest.raises(CheckpointError, match=r'cut\.pth: expected a checkpoint'):
            CheckpointLoader.load_checkpoint(str(path))


def test_files_without_checksums_load(checkpoint, tmp_path):
    """``torch.serialization.set_crc32_options(False)`` writes such files."""
    path = tmp_path / 'unchecked.pth'
    content = torch.load(checkpoint, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(dict(CheckpointLoader.load_checkpoint(str(path))['state_dict']), dict(content['state_dict']))


OUT_OF_MEMORY = """
import resource
from pathlib import Path
import torch
from mmspatialmamba import SpatialMamba

model = SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1))).eval()
used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
model(torch.zeros(1, 3, 2048, 2048))
"""


@pytest.mark.end_to_end
def test_out_of_memory_says_what_to_lower():
    result = subprocess.run([sys.executable, '-c', OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    output = result.stdout + result.stderr
    assert 'SpatialMamba: out of memory for an image batch (1, 3, 2048, 2048). Lower the batch size' in output
    assert "can't allocate memory" in result.stderr.splitlines()[-1]
