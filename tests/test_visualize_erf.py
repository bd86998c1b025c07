"""`tools/visualize_erf.py`: fields of known size, areas, tables, pictures and bad input."""

import csv

import cv2
import numpy as np
import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from tool_runner import ROOT, load_tool, refusal, run_tool
from torch import nn

from mmspatialmamba.inspection import build_model, read_config

QUICKSTART = ROOT / 'configs' / 'quickstart_mask_rcnn.py'

erf = load_tool('visualize_erf')


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        cv2.imwrite(str(folder / f'{index}.png'), rng.integers(0, 256, (70, 90, 3), np.uint8))
    return folder


class Convolutions(nn.Module):
    """A 3x3 convolution of stride 2, then a 5x5 convolution; all weights 1."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 3, 2, 1, bias=False), nn.Conv2d(2, 2, 5, padding=2, bias=False)
        for layer in (self.first, self.second):
            nn.init.ones_(layer.weight)

    def forward(self, x):
        x = self.first(x)
        return x, self.second(x)


def test_field_of_convolutions_is_their_receptive_field(images):
    model = nn.Module()
    model.backbone = Convolutions()
    model.data_preprocessor = ImgDataPreprocessor()
    first, second = erf.receptive_fields(model, sorted(images.iterdir()), 32, 48)
    assert (first.stride, second.stride) == (2, 2)
    rows, columns = np.nonzero(first.contribution)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 17, 23, 25)
    assert first.middle == (16, 24)
    assert (first.contribution[15:18, 23:26] == 6).all()  # 3 image channels to 2 features, weights 1
    assert first.square(0.1) == (1, pytest.approx(1 / (32 * 48)))  # the middle holds 1 of 9
    assert first.square(0.2) == (3, pytest.approx(9 / (32 * 48)))
    assert second.square(0.99)[0] == 3 + 2 * 4
    assert second.middle == (16, 24)


def test_squares_against_a_search():
    field = erf.Field(np.random.default_rng(1).gamma(0.3, size=(13, 22)), 4)
    row, column = field.middle
    total = field.contribution.sum()
    assert field.contribution[:row].sum() < total / 2 <= field.contribution[: row + 1].sum()
    assert field.contribution[:, :column].sum() < total / 2 <= field.contribution[:, : column + 1].sum()
    for share in (0.01, 0.2, 0.5, 0.9, 0.99, 1.0):
        for radius in range(30):
            inside = field.contribution[
                max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1
            ]
            if inside.sum() >= share * total * (1 - 1e-12):
                break
        side, area = field.square(share)
        assert side == 2 * radius + 1
        assert area == pytest.approx(inside.size / field.contribution.size)


def test_before_and_after_training(images, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / 'trained.pth'
    torch.save({'state_dict': build_model(read_config(str(QUICKSTART)), seed=5).state_dict()}, checkpoint)
    args = (images, '--size', 64, 96, '--out', tmp_path / 'out' / 'erf.png')
    run_tool(erf, *args, '--model', 'A', QUICKSTART, checkpoint, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    with (tmp_path / 'out' / 'erf.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows[::12]] == ['A, random weights', 'A, trained']
    assert [(int(row['stride']), int(row['contribution_percent'])) for row in rows[:12]] == [
        (stride, share) for stride in (4, 8, 16, 32) for share in (20, 50, 99)
    ]
    before, after = ([(row['side_px'], row['area_percent']) for row in rows[start : start + 12]] for start in (0, 12))
    assert before != after
    assert all(0 < float(row['area_percent']) <= 100 for row in rows)
    assert 'A, trained",32,99' in printed
    picture = cv2.imread(str(tmp_path / 'out' / 'erf.png'))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


@pytest.mark.end_to_end
def test_swin_and_resnet_of_the_toolbox(images, tmp_path, monkeypatch):
    models = (
        '--model', 'Swin-T', 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        '--model', 'ResNet-50', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    )  # fmt: skip
    options = ('--size', 64, 64, '--max-images', 1, '--out', tmp_path / 'erf.jpg')
    run_tool(erf, images, *options, *models, monkeypatch=monkeypatch)
    rows = list(csv.reader((tmp_path / 'erf.csv').read_text().splitlines()))
    assert len(rows) == 1 + 2 * 4 * 3


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('images', '--model', 'A'), 'argument --model: expected LABEL CONFIG [CHECKPOINT], got A'),
        (('images', '--model', 'A', 'b.py'), 'b.py: expected a config file, found no such file'),
        (('images', '--model', 'A', QUICKSTART, 'c.pth'), 'c.pth: expected a checkpoint file, found no such file'),
        (('images', '--model', 'A', 'b.py', '--model', 'A', 'c.py'), 'expected a LABEL of its own for each model'),
        (
            ('images', '--model', 'A', QUICKSTART, '--out', 'erf.txt'),
            ".webp, .svg, .pdf, got 'erf.txt'",
        ),
        (('empty', '--model', 'A', QUICKSTART), 'empty: expected a folder of images'),
        (('images', '--size', 0, 8, '--model', 'A', QUICKSTART), 'expected at least 1 image of at least 1x1 pixel'),
    ],
)
def test_bad_input_is_one_line(args, message, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(erf, *args, monkeypatch=monkeypatch, capsys=capsys)
