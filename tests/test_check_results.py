"""`tools/check_results.py` against published figures: within, not within, unpublished, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / 'tools' / 'check_results.py'


def check(tmp_path, config, metrics, *options):
    path = tmp_path / 'metrics.json'
    path.write_text(json.dumps(metrics))
    command = (sys.executable, str(TOOL), config, str(path), *options)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_published_metrics_within_and_not_within(tmp_path):
    metrics = {'coco/bbox_mAP': 0.476, 'coco/segm_mAP': 0.428, 'coco/bbox_mAP_s': 0.3, 'coco/bbox_mAP_l': -1.0}
    result = check(tmp_path, 'configs/mask_rcnn_sm_t.py', metrics, '--tolerance', '0.15')
    assert result.returncode == 0, result.stderr
    assert 'box AP: 47.60, published 47.6, within 0.15' in result.stdout
    assert 'coco/bbox_mAP_s: 30.00, not published' in result.stdout
    metrics['coco/segm_mAP'] = 0.42
    result = check(tmp_path, 'configs/mask_rcnn_sm_t.py', metrics)
    assert result.returncode == 1
    assert 'mask AP: 42.00, published 42.9, NOT within 0.1' in result.stdout


@pytest.mark.parametrize(('options', 'published'), [((), 48.6), (('--tta',), 49.4)])
def test_single_and_multi_scale(tmp_path, options, published):
    result = check(tmp_path, 'upernet_sm_t.py', {'mIoU': 50.0}, *options)
    assert result.returncode == 0
    assert f'published {published}' in result.stdout


@pytest.mark.parametrize(
    ('config', 'metrics', 'message'),
    [
        ('atss_sm_t.py', {'coco/bbox_mAP': 0.4}, 'atss_sm_t.py: no published result'),
        ('mask_rcnn_sm_t.py', {'mIoU': 50.0}, 'expected coco/bbox_mAP, coco/segm_mAP, found mIoU'),
        ('mask_rcnn_sm_t.py', [], 'expected the JSON object of metrics'),
    ],
)
def test_bad_input_is_one_line(tmp_path, config, metrics, message):
    result = check(tmp_path, config, metrics)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
