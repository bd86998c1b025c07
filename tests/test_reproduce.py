"""`tools/reproduce.py` with weights and data of our own: the toolbox's test runs, and its metrics are compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmspatialmamba
from mmspatialmamba.published import FOLDER_VARIABLE

TOOLS = Path(__file__).parents[1] / 'tools'
OPTIONS = (
    '--cfg-options',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'test_dataloader.dataset.pipeline.1.scale=(128,128)',
)
ALL_BOXES = 'model.test_cfg.rcnn.score_thr=0'  # random weights are sure of nothing


def reproduce(folder, *arguments):
    command = (sys.executable, '-W', 'ignore', str(TOOLS / 'reproduce.py'), *map(str, arguments))
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Writes random weights of a published model into the folder of weights."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))

    def write(name):
        config = Config.fromfile(mmspatialmamba.config_path(f'{name}.py'))
        with DefaultScope.overwrite_default_scope(config.default_scope):
            model = MODELS.build(config.model)
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / f'{name}.pth')

    return write


def write_image(path, height=64, width=96):
    import mmcv

    mmcv.imwrite(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), str(path))


def write_coco(folder):
    """A validation set of one image with one object, in COCO's classes."""
    from mmdet.datasets import CocoDataset

    write_image(folder / 'val2017' / '1.jpg')
    box = [10.0, 10.0, 40.0, 30.0]
    content = {
        'images': [{'id': 1, 'file_name': '1.jpg', 'height': 64, 'width': 96}],
        'annotations': [
            {
                'id': 1,
                'image_id': 1,
                'category_id': 1,
                'bbox': box,
                'area': 1200.0,
                'iscrowd': 0,
                'segmentation': [[10, 10, 50, 10, 50, 40, 10, 40]],
            }
        ],
        'categories': [{'id': i, 'name': name} for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)],
    }
    (folder / 'annotations').mkdir()
    (folder / 'annotations' / 'instances_val2017.json').write_text(json.dumps(content))


def write_ade(folder):
    """A validation set of one image, in ADE20K's layout."""
    import mmcv

    write_image(folder / 'images' / 'validation' / '1.jpg')
    labels = np.random.default_rng(0).integers(1, 151, (64, 96), dtype=np.uint8)
    mmcv.imwrite(labels, str(folder / 'annotations' / 'validation' / '1.png'))


@pytest.mark.end_to_end
def test_a_detector(weights, tmp_path):
    weights('mask_rcnn_sm_t')
    write_coco(tmp_path / 'sets' / 'coco')
    result = reproduce(tmp_path, 'mask_rcnn_sm_t', '--data', tmp_path / 'sets', *OPTIONS, ALL_BOXES)
    assert result.returncode == 1, result.stderr[-3000:]
    *_, box, mask = result.stdout.splitlines()
    assert box.startswith('mask_rcnn_sm_t: box AP: 0.00, published 47.6, NOT within 0.1')
    assert mask.startswith('mask_rcnn_sm_t: mask AP: 0.00, published 42.9, NOT within 0.1')


@pytest.mark.end_to_end
def test_a_segmentor_in_one_scale_and_in_several(weights, tmp_path):
    weights('upernet_sm_t')
    write_ade(tmp_path / 'data' / 'ade' / 'ADEChallengeData2016')
    result = reproduce(tmp_path, 'spatialmamba://upernet_sm_t', '--tolerance', 100, *OPTIONS)
    assert result.returncode == 0, result.stderr[-3000:]
    *_, single, multi = result.stdout.splitlines()
    assert single.startswith('upernet_sm_t: mIoU: ')
    assert 'published 48.6, within' in single
    assert multi.startswith('upernet_sm_t: mIoU(ms+flip): ')
    assert 'published 49.4, within' in multi


@pytest.mark.end_to_end
def test_what_cannot_be_run_is_named_and_the_others_go_on(weights, tmp_path):
    for name in ('mask_rcnn_sm_t', 'mask_rcnn_sm_s'):
        (tmp_path / 'weights' / f'{name}.pth').write_bytes(b'damaged')
    (tmp_path / 'data').mkdir()
    result = reproduce(tmp_path, 'mask_rcnn_sm_t', 'mask_rcnn_sm_s')
    assert result.returncode == 1
    *_, first, second = result.stdout.splitlines()
    assert first.startswith('mask_rcnn_sm_t: not compared: the test of mmdet ended with status')
    assert second.startswith('mask_rcnn_sm_s: not compared: ')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['mask_rcnn_sm_x'], 'reproduce: spatialmamba://mask_rcnn_sm_x: expected spatialmamba:// and the name'),
        (['mask_rcnn_sm_t'], 'reproduce: --data: expected the folder of the data sets, found none at data'),
        (
            ['all', '--data', 'nowhere'],
            'reproduce: --data: expected the folder of the data sets, found none at nowhere',
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    result = reproduce(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
