"""`tools/benchmark.py`: rows, parity before time, peers from what is installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from tool_runner import load_tool, run_tool

benchmark = load_tool('benchmark')


def test_rows_of_the_ops(tmp_path, monkeypatch):
    run_tool(
        benchmark, 'ops', '--shapes', 't1_32x48', '--rounds', 2, '--threads', 1, '--device', 'cpu', '--out', tmp_path,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    (path,) = tmp_path.glob('ops_*.json')
    content = json.loads(path.read_text())
    names = [row['row'] for row in content['rows']]
    kinds = ('forward', 'backward', 'forward, reference')
    for op in ('structure_aware_ssm', 'scan_states', 'state_fusion', 'gated_norm', 'depthwise_conv with the residual'):
        assert [f'{op} {kind}' for kind in kinds] == [name for name in names if name.startswith(op)]
    assert all(row['median_ms'] > 0 and row['quartile_1_ms'] <= row['quartile_3_ms'] for row in content['rows'])
    assert content['header']['torch'] == torch.__version__


@pytest.mark.parametrize('part', ['the output', 'gradient 1'])
def test_nothing_is_timed_before_parity(part):
    class Wrong(torch.autograd.Function):
        """Doubles, but is wrong in float32 in one of its two directions."""

        @staticmethod
        def forward(ctx, x):
            return x * (2.1 if part == 'the output' and x.dtype == torch.float32 else 2)

        @staticmethod
        def backward(ctx, dy):
            return dy * (2.1 if part == 'gradient 1' and dy.dtype == torch.float32 else 2)

    with pytest.raises(ValueError, match=f'double: {part} differs from the reference by 5.0e-02'):
        benchmark.check_parity('double', Wrong.apply, (torch.randn(5),))


def test_peers_are_taken_from_what_is_installed(monkeypatch):
    installed = {'timm': SimpleNamespace(create_model=lambda name, **options: (name, options))}

    def import_module(name):
        if name in installed:
            return installed[name]
        raise ImportError(f'No module named {name!r}')

    monkeypatch.setattr(benchmark.importlib, 'import_module', import_module)
    assert benchmark.build_peer('convnext_t', (64, 96)) == ('convnext_tiny', {'features_only': True})
    name, options = benchmark.build_peer('swin_t', (64, 96))
    assert name.startswith('swin_tiny')
    assert options['img_size'] == (64, 96)
    installed.clear()
    with pytest.raises(ImportError, match=r'mmdet.*timm.*torchvision'):
        benchmark.build_peer('resnet_50', (64, 96))


def test_quartiles_stay_within_the_samples():
    row = benchmark.summarise([benchmark.Sample(1e-3, 5e-4), benchmark.Sample(3e-3, 7e-4)])
    assert row == pytest.approx({'median_ms': 2.0, 'quartile_1_ms': 1.5, 'quartile_3_ms': 2.5, 'enqueue_ms': 0.6})


def test_peers_of_which_none_can_be_imported(monkeypatch, tmp_path, capsys):
    def build_peer(name, size):
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(benchmark, 'build_peer', build_peer)
    with pytest.raises(SystemExit) as stop:
        run_tool(
            benchmark,
            'backbones',
            '--models',
            'convnext_t',
            '--device',
            'cpu',
            '--out',
            tmp_path,
            monkeypatch=monkeypatch,
        )
    assert stop.value.code == 'nothing to measure: none of the models can be imported'
    assert "convnext_t: left out, it cannot be imported (No module named 'torchvision')" in capsys.readouterr().out
