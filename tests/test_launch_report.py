"""`tools/launch_report.py`: what a block launches and touches on a GPU, counted without one."""

import pytest
import torch
from mmspatialmamba.ops import gelu
from tool_runner import load_tool, run_tool
from torch import nn

pytest.importorskip('triton', reason='Triton is not installed')
launch_report = load_tool('launch_report')

GRID = (200, 320)
MIB = 2**20


@pytest.fixture(scope='module')
def passes():
    """Launches of a block of the first stage of tiny at 800x1280, batch 2, forward and backward."""
    return launch_report.record_block(64, GRID, 2, drop_path_rate=0.1)


@pytest.mark.parametrize(('index', 'launches', 'mib'), [(0, 34, 1150), (1, 53, 2840)])
def test_a_block_stays_within_what_was_reached(passes, index, launches, mib):
    """At most so many launches and MiB: 34 and 1138 forward, 53 and 2788 backward were counted."""
    assert len(passes[index]) <= launches, [launch.kernel for launch in passes[index]]
    assert sum(launch.bytes for launch in passes[index]) <= mib * MIB


@pytest.mark.parametrize(
    ('kernel', 'index', 'count'),
    [
        ('conv_kernel', 0, 3),
        ('conv_activation_kernel', 1, 1),
        ('conv_backward_kernel', 1, 3),
        ('layer_norm_kernel', 0, 2),
        ('layer_norm_backward_kernel', 1, 2),
        ('gated_norm_kernel', 0, 1),
        ('gated_norm_backward_kernel', 1, 1),
        ('taps_kernel', 0, 1),
        ('taps_backward_kernel', 1, 1),
        ('partial_sums_kernel', 1, 7),  # of the core, three convolutions and three norms
    ],
)
def test_each_op_is_one_launch_forward_and_as_few_backward(passes, kernel, index, count):
    assert [launch.kernel for launch in passes[index]].count(kernel) == count


def test_maps_that_a_kernel_touches():
    """A depthwise convolution with SiLU of half a map: 2 values of 2 bytes per pixel and channel, 5 backward."""
    x = torch.empty(2, *GRID, 256, dtype=torch.bfloat16, device='meta')[..., :128].requires_grad_()
    weight, bias = torch.empty(128, 1, 3, 3, device='meta'), torch.empty(128, device='meta')
    recorder = launch_report.Recorder()
    with launch_report.recorded_kernels(recorder), recorder:
        torch.ops.mmspatialmamba.depthwise_conv(x, weight, bias, 1, 'silu', False, False).backward(
            torch.empty(2, *GRID, 128, dtype=torch.bfloat16, device='meta')
        )
    size = 2 * 128 * GRID[0] * GRID[1] * 2
    touched = {launch.kernel: launch.bytes / size for launch in recorder.launches}
    assert touched['conv_kernel'] == pytest.approx(2, rel=0.01)
    assert touched['conv_activation_kernel'] == pytest.approx(3.6, rel=0.1)  # partial sums with it
    assert touched['conv_backward_kernel'] == pytest.approx(4.6, rel=0.1)  # with dy, x and sums, which it leaves alone


def test_views_and_allocations_are_free_and_the_rest_is_not():
    recorder = launch_report.Recorder()
    x = torch.empty(4, 6, device='meta')
    with recorder:
        y = x.view(6, 4).t()[1:].unsqueeze(0)
        torch.empty_like(x), x.new_empty(3), x.detach(), x.contiguous()
        assert recorder.launches == []
        y.contiguous()
        x.new_ones(100)
        x.add_(1)
        nn.functional.gelu(x)
    assert [launch.kernel.split('.')[1] for launch in recorder.launches] == ['clone', 'new_ones', 'add_', 'gelu']
    assert [launch.bytes for launch in recorder.launches] == [4 * 2 * 18, 4 * 100, 4 * 24, 4 * 2 * 24]


@pytest.mark.filterwarnings('ignore:mmspatialmamba..gelu. plain PyTorch')  # there are no kernels for no device
def test_an_op_without_triton_kernels_counts_as_what_it_is_on_a_gpu():
    recorder = launch_report.Recorder()
    with recorder:
        gelu(torch.empty(3, 4, device='meta'))
    assert recorder.launches == [launch_report.Launch('aten.gelu.default', 4 * 2 * 12)]


def test_kernels_are_back_afterwards(passes):
    from mmspatialmamba.ops.depthwise_conv import triton_kernels

    assert not isinstance(triton_kernels.conv_kernel, launch_report.Kernel)


def test_prints_a_row_for_each_stage(monkeypatch, capsys):
    run_tool(launch_report, '--shape', 64, 96, '--channels', 16, '--batch', 1, '--by-kernel', monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    for stage in range(1, 5):
        for name in ('forward', 'backward'):
            assert f'stage {stage} {name}' in out
    assert 'conv_kernel' in out
