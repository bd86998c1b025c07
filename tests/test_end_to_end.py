"""Training and evaluation through mim, as a user runs them; minutes on two CPU cores."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parents[1]
MIM = str(Path(sys.executable).with_name('mim'))
QUICKSTART = ROOT / 'work_dirs' / 'quickstart'
SHAPES = "('circle','square','triangle')"


def run(*command):
    """Runs a command in the checkout and returns what it printed."""
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


@pytest.fixture(scope='module')
def quickstart():
    """The work directory of ``make quickstart``, which reuses what is there."""
    run('make', 'quickstart')
    return QUICKSTART


def test_quickstart_detects_shapes_that_it_did_not_train_on(quickstart):
    reports = sorted(quickstart.glob('test/*/*.json'))
    metrics = json.loads(reports[-1].read_text())
    assert metrics['coco/bbox_mAP_50'] >= 0.5
    assert metrics['coco/segm_mAP_50'] >= 0.5


def test_quickstart_draws_predictions(quickstart):
    assert len(list((quickstart / 'predictions').glob('*.jpg'))) == 64


def test_training_resumes(quickstart, tmp_path):
    command = (
        MIM, 'train', 'mmdet', 'configs/quickstart_mask_rcnn.py', '--work-dir', str(tmp_path), '--resume',
        '--cfg-options', 'train_dataloader.dataset.indices=16', 'val_dataloader.dataset.indices=2',
        'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1',
    )  # fmt: skip
    run(*command, 'train_cfg.max_epochs=1')
    output = run(*command, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 2' in output
    assert re.search(r'epoch_1\.pth: \d+ of \d+ tensors matched, 0 missing, 0 unexpected', output)
    assert 'Epoch(val)   [2]' in re.sub(r'Epoch\(val\)\s*\[2\]', 'Epoch(val)   [2]', output)
    assert (tmp_path / 'epoch_2.pth').exists()


def test_published_recipe_trains_and_tests_at_full_size(quickstart, tmp_path):
    data = (
        'data_root=data/shapes/coco/', 'indices=2', f'metainfo.classes={SHAPES}',
    )  # fmt: skip
    options = [f'{split}_dataloader.dataset.{option}' for split in ('train', 'val', 'test') for option in data]
    options += [
        f'{split}_evaluator.ann_file=data/shapes/coco/annotations/instances_val2017.json' for split in ('val', 'test')
    ]
    options += [f'model.roi_head.{head}.num_classes=3' for head in ('bbox_head', 'mask_head')]
    options += ['train_cfg.max_epochs=1', 'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
    common = ('--work-dir', str(tmp_path), '--cfg-options', *options)
    config = 'configs/mask_rcnn_sm_t.py'
    run(MIM, 'train', 'mmdet', config, *common)
    output = run(MIM, 'test', 'mmdet', config, '--checkpoint', str(tmp_path / 'epoch_1.pth'), *common)
    assert re.search(r'epoch_1\.pth: \d+ of \d+ tensors matched, 0 missing, 0 unexpected', output)
