"""`tools/kernel_report.py`: what the compiler makes of the Triton kernels, seen without a GPU."""

import dataclasses

import pytest
import torch
from tool_runner import load_tool, run_tool

pytest.importorskip('triton', reason='Triton is not installed')
report = load_tool('kernel_report')
from mmspatialmamba.ops import triton_backend  # noqa: E402, needs Triton

slow = pytest.mark.end_to_end


@pytest.mark.parametrize(
    ('stage', 'words', 'instructions'),
    [
        (1, ['carry_kernel', 'scan_kernel'], 35),
        (1, ['scan_backward'], 110),
        (2, ['scan_backward'], 165),
        (3, ['scan_backward', 'step_size_backward'], 65),
        pytest.param(1, ['fusion_kernel'], 60, marks=slow),
        pytest.param(1, ['adjoint_kernel'], 70, marks=slow),
        pytest.param(1, ['taps_gradient'], 135, marks=slow),
    ],
)
def test_instructions_stay_few_and_nothing_is_spilled(stage, words, instructions):
    """Measured: 32 and 32; 103; 155; 58 and 54; 59; 67; 132 instructions for each value, bf16, with Triton 3.6."""
    rows = report.report(stage, torch.bfloat16, words)
    assert len(rows) >= len(words)
    for row in rows:
        assert row['instructions'] <= instructions, row
        assert not row['spilled'], row
        assert row['warps'] >= 8, row


@pytest.mark.parametrize(
    ('stage', 'words', 'instructions'),
    [
        (1, ['orders_carry', 'orders_scan'], 430),
        pytest.param(4, ['orders_carry', 'orders_scan'], 740, marks=slow),
        pytest.param(1, ['orders_backward'], 300, marks=slow),
    ],
)
def test_four_orders_spill_nothing(stage, words, instructions):
    """At most 396 instructions for each value in stage 1, 677 in stage 4; 285 backward; bf16, with Triton 3.6."""
    rows = report.report(stage, torch.bfloat16, words, report.ORDERED)
    assert len(rows) >= len(words)
    for row in rows:
        assert row['instructions'] <= instructions, row
        assert not row['spilled'], row
        assert row['warps'] >= 8, row


@pytest.mark.parametrize(('stage', 'limit'), [(1, 20), (2, 20), (3, 21), (4, 24)])
def test_four_orders_read_the_map_twice_and_write_it_once(stage, limit):
    """Six bytes for each value in 16 bits; with carries and what belongs to a position 19.3, 19.6, 20.6 and 23.2."""
    (H, W), E, _, _ = report.STAGES[report.ORDERED][stage - 1]
    forward, _ = report.launches_of_stage(stage, torch.bfloat16, report.ORDERED)
    elements = report.BATCH * H * W * E
    maps = [
        value
        for launch in forward
        for value in launch.values.values()
        if isinstance(value, torch.Tensor) and value.shape == (report.BATCH, H, W, E)
    ]
    assert sum(value.numel() * value.element_size() for value in maps) == 6 * elements
    assert sum(map(report.bytes_moved, forward)) <= limit * elements


def multi_scale_sizes():
    """Padded sizes of training on images of 480 to 800 by up to 1344 pixels, in both orientations."""
    for short in range(480, 801, 32):
        for long in range(short, 1345, 96):
            yield short, long
            yield long, short


def test_a_multi_scale_run_compiles_few_kernels():
    """46 kernels serve the core and the gated norm in all sizes; without `do_not_specialize` there were 106."""
    dtype = torch.bfloat16

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device='meta')

    with report.recorded() as launches:
        for height, width in multi_scale_sizes():
            for stage, (_, E, R, _) in enumerate(report.STAGES[report.CORE]):
                shape = (2, height // 4 >> stage, width // 4 >> stage)
                u, z = empty(*shape, E, dtype=dtype), empty(*shape, 2 * E, dtype=dtype)[..., E:]
                maps = (u, *empty(*shape, R + 2, dtype=dtype).split((R, 1, 1), -1))
                core = (*maps, empty(E, R), empty(E), empty(E), empty(E), empty(25, E))
                triton_backend.IMPLEMENTATIONS['structure_aware_ssm'][0](*core)
                triton_backend.IMPLEMENTATIONS['structure_aware_ssm_backward'][0](u, *core)
                norm = (u, z, empty(E), empty(E), 1e-5)
                triton_backend.IMPLEMENTATIONS['gated_norm'][0](*norm)
                triton_backend.IMPLEMENTATIONS['gated_norm_backward'][0](u, *norm, False)
    kernels = {report.specialization(launch) for launch in launches}
    assert len(launches) > 10_000
    assert len({launch.kernel for launch in launches}) == 13
    assert len(kernels) <= 48


def test_loops_are_found_and_weighted():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FFMA R2, R2, R3, R4 ;
        /*0020*/              @!P0 FADD R2, R2, R5 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   NOP ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2) ;
"""
    instructions, loops = report._disassembled(code)
    assert [instruction.split()[0] for instruction in instructions] == ['MOV', 'FFMA', 'FADD', 'BRA', 'EXIT', 'BRA']
    assert loops == ((1, 3),)
    compiled = report.Compiled(32, 0, 0, instructions, loops)
    forward, _ = report.launches_of_stage(1, torch.bfloat16)
    fusion = next(launch for launch in forward if launch.name == 'fusion_kernel')
    assert report.instructions_run(fusion, compiled) == 6 + 3
    combine = next(launch for launch in forward if launch.name == 'combine_kernel')
    with pytest.raises(RuntimeError, match='combine_kernel: the machine code has 0 loops'):
        report.trips(combine, dataclasses.replace(compiled, loops=()))


def test_launchers_are_back_afterwards():
    with report.recorded():
        pass
    for module in report.MODULES:
        if hasattr(module, 'launch'):
            assert module.launch is triton_backend.launch


def test_prints_a_table(monkeypatch, capsys):
    run_tool(report, '--stages', 3, '--kernels', 'combine', monkeypatch=monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| 3 ')]
    assert len(lines) == 5  # one forward, two backward, a sum of each
    assert 'combine_kernel (adjoint)' in lines[2]


@slow
def test_every_kernel_of_the_core_has_a_row():
    forward, backward = report.launches_of_stage(4, torch.bfloat16)
    adding = [launch for launch in (*forward, *backward) if launch.name == 'partial_sums_kernel']
    assert len(adding) == 1
    assert len(report.report(4, torch.bfloat16, [])) == len(forward) + len(backward) - 1
