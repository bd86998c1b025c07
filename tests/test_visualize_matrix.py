"""`tools/visualize_matrix.py`: matrices against loops and convolutions, faults that its check must find, bad input."""

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from mmspatialmamba.ops import fusion_taps, selective_scan, structure_aware_ssm
from mmspatialmamba.ops.selective_scan.orders import addresses
from oracles import fusion_convolutions, fusion_weights, orders_arguments, relative_error, scan_loop, ssm_inputs
from tool_runner import ROOT, load_tool, refusal, run_tool

from mmspatialmamba.inspection import ScanRecord, SSMRecord
from mmspatialmamba.models.vmamba import SelectiveScan

QUICKSTART = ROOT / 'configs' / 'quickstart_mask_rcnn.py'
GRID = (4, 7)

matrix = load_tool('visualize_matrix')


@pytest.fixture
def record():
    inputs, kernels, alpha = ssm_inputs(GRID, channels=19, batch=1)
    arguments = (*inputs, fusion_taps(*kernels, alpha))
    return SSMRecord(*arguments, structure_aware_ssm(*arguments))


def test_scan_matrix_is_the_scan(record):
    u, delta, B = (x.flatten(1, 2) for x in (record.u, record.delta, record.B))
    found = torch.einsum('els,se->le', matrix.scan_matrix(delta[0], record.A, B[0]), u[0])
    assert relative_error(found, scan_loop(u, delta, record.A, B)[0]) < 1e-14  # measured: 5e-16


@pytest.mark.parametrize('grid', [(1, 1), (1, 9), (3, 2), GRID])
def test_fusion_matrix_is_the_convolutions(grid):
    kernels, alpha = fusion_weights(5)
    h = torch.randn(1, *grid, 5, dtype=torch.float64)
    found = torch.einsum('els,se->le', matrix.fusion_matrix(fusion_taps(*kernels, alpha), *grid), h[0].flatten(0, 1))
    expected = fusion_convolutions(h, kernels, alpha)[0].flatten(0, 1)
    assert relative_error(found, expected) < 1e-14  # measured: 6e-16


def test_theories_differ_as_they_should(record):
    pictures = {}
    for name, theory in matrix.mixers(record).items():
        pictures[name], error = matrix.summarize(theory)
        assert error < matrix.TOLERANCE
    attention, mamba, spatial = pictures.values()
    later = np.triu(np.ones_like(mamba, dtype=bool), 1)
    assert (attention[later] == 0).all()
    assert (mamba[later] == 0).all()
    assert (spatial[later] > 0).mean() > 0.5
    assert (mamba <= attention).all()
    assert np.allclose(np.diag(mamba), np.diag(attention), rtol=1e-14, atol=0)  # a token reads itself without decay
    assert mamba[-1, 0] < 0.1 * attention[-1, 0]


def zero_padding(taps, height, width):
    found = matrix_fusion(taps, height, width)
    found[:, 0, 0] -= taps[1]
    return found


def no_fusion(taps, height, width):
    return torch.eye(height * width, dtype=taps.dtype).expand(taps.shape[1], -1, -1)


matrix_fusion = matrix.fusion_matrix


@pytest.mark.parametrize('fault', [zero_padding, no_fusion])
def test_a_wrong_matrix_fails(fault, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, 'fusion_matrix', fault)
    args = (QUICKSTART, '--grid', 3, 4, '--out', tmp_path / 'matrix.png')
    assert run_tool(matrix, *args, monkeypatch=monkeypatch) == 1
    (error,) = re.findall(r'Spatial-Mamba: \(M - D I\) u differs from the op by (\S+) ', capsys.readouterr().out)
    assert float(error) > 1e-3


def test_picture_of_a_model(monkeypatch, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / 'image.png'), np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    args = (QUICKSTART, '--image', tmp_path / 'image.png', '--block', 2, 1, '--grid', *GRID)
    assert run_tool(matrix, *args, '--out', tmp_path / 'out' / 'm.png', monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r'differs from the op by \d\.\de-1[34567] of', printed)) == 3
    assert len(np.unique(cv2.imread(str(tmp_path / 'out' / 'm.png')).reshape(-1, 3), axis=0)) > 100


@pytest.fixture
def scans():
    arguments = orders_arguments(GRID, channels=19, batch=1, states=2)
    orders = addresses('selective_scan', SelectiveScan.ORDERS, 4, *GRID)
    return ScanRecord(*arguments, orders, selective_scan(*arguments))


def test_orders_of_vmamba(scans, monkeypatch):
    pictures = {}
    for name, theory in matrix.mixers(scans).items():
        pictures[name], error = matrix.summarize(theory)
        assert error < matrix.TOLERANCE  # measured: at most 2e-15
    assert list(pictures) == ['linear attention', 'Mamba', 'VMamba']
    later = np.triu(np.ones_like(pictures['Mamba'], dtype=bool), 1)
    assert (pictures['Mamba'][later] == 0).all()
    assert (pictures['VMamba'] > 0).all()
    monkeypatch.setattr(ScanRecord, 'visits', [torch.arange(GRID[0] * GRID[1])] * 4)
    assert matrix.summarize(replace(scans))[1] > 1e-3  # rows for every order


def test_picture_of_a_vmamba(monkeypatch, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(ROOT / "configs" / "cls_vmamba_t.py")!r}\n'
        'model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 1, 1), ssm_ratio=2)),\n'
        '             head=dict(in_channels=128))\n'
    )
    assert run_tool(matrix, config, '--grid', *GRID, '--out', tmp_path / 'm.png', monkeypatch=monkeypatch) == 0
    assert 'VMamba: (M - D I) u differs from the op by' in capsys.readouterr().out
    assert len(np.unique(cv2.imread(str(tmp_path / 'm.png')).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('none.py',), 'none.py: expected a config file, found no such file'),
        (
            (QUICKSTART, '--block', 1, 3),
            'among 1, 1, 2, 1 blocks of the stages, found (1, 3)',
        ),
        ((QUICKSTART, '--grid', 64, 65), 'argument --grid: expected 1 to 1024 tokens, got 64x65'),
        ((QUICKSTART, '--image', 'none.png'), 'none.png: expected an image file, found no such file'),
        ((QUICKSTART, '--checkpoint', 'none.pth'), 'none.pth: expected a checkpoint file, found no such file'),
    ],
)
def test_bad_input_is_one_line(args, message, monkeypatch, capsys):
    assert message in refusal(matrix, *args, monkeypatch=monkeypatch, capsys=capsys)
