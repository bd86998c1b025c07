"""The ops, the backbone and whole models in ONNX: ONNX Runtime against the loop, and against PyTorch at other sizes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision_setup  # noqa: F401, before mmpretrain
from oracles import (
    Call,
    conv_arguments,
    fusion_convolutions,
    fusion_weights,
    norm_arguments,
    orders_arguments,
    orders_loop,
    relative_error,
    scan_inputs,
    scan_loop,
    ssm_arguments,
    ssm_inputs,
    ssm_loop,
)
from tool_runner import load_tool

from mmspatialmamba import SpatialMamba, VMamba, fuse, ops

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'export_onnx.py'
load_tool('run_onnx')
export_onnx = load_tool('export_onnx')

onnxruntime = pytest.importorskip('onnxruntime')
quantization = pytest.importorskip('onnxruntime.quantization')
onnx_export = pytest.importorskip('mmspatialmamba.onnx_export')

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}
GRIDS = ((4, 5), (1, 1), (1, 17), (19, 1), (11, 6), (7, 13))
"""Grids (H, W); the first is the exported one."""

TOLERANCE = 4e-6
"""Ten times the largest relative error of an op in float32, measured over GRIDS and decays: 4.0e-7."""


def open_session(program):
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])


def run(session, *tensors):
    names = [value.name for value in session.get_inputs()]
    (output,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
    return torch.from_numpy(output)


def export(function, arguments, dynamic_axes):
    """Exports a function; each of its first arguments has the given dynamic axes, the others have none."""
    axes = tuple(dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for dynamic in dynamic_axes)
    shapes = (*axes, *[None] * (len(arguments) - len(axes)))
    program = torch.onnx.export(
        Call(function).eval(),
        tuple(arguments),
        dynamo=True,
        verbose=False,
        dynamic_shapes=(shapes,),
        custom_translation_table=onnx_export.TRANSLATIONS,
    )
    return open_session(program)


@pytest.fixture(scope='module')
def ssm():
    """A session of the fused op, exported on the first grid."""
    return export(ops.structure_aware_ssm, ssm_arguments(GRIDS[0], dtype=torch.float32), ((0, 1, 2),) * 4)


def test_scan_and_fusion_on_any_grid(ssm):
    for batch, grid in zip((2, 1, 3, 2, 1, 2), GRIDS, strict=True):
        inputs, kernels, alpha = ssm_inputs(grid, batch=batch, dtype=torch.float32)
        expected = ssm_loop(*(x.double() for x in inputs), [x.double() for x in kernels], alpha.double())
        actual = run(ssm, *ssm_arguments(grid, batch=batch, dtype=torch.float32))
        assert relative_error(actual, expected) < TOLERANCE


def test_a_lost_carry_and_zero_padding_are_noticed():
    inputs, kernels, alpha = ssm_inputs((7, 13))
    u, delta, A, B = scan_inputs(7 * 13)
    rows = [x.unflatten(1, (7, 13)).flatten(0, 1) for x in (u, delta, B)]
    expected = scan_loop(u, delta, A, B)
    without_carry = scan_loop(rows[0], rows[1], A, rows[2]).unflatten(0, (2, 7)).flatten(1, 2)
    assert relative_error(without_carry, expected) > 1e3 * TOLERANCE
    fused = fusion_convolutions(inputs[0], kernels, alpha)
    assert relative_error(fusion_convolutions(inputs[0], kernels, alpha, 'constant'), fused) > 1e3 * TOLERANCE


def test_scan_states_of_any_length():
    names = ('u', 'delta', 'A', 'B')
    order = [names.index(name) for name in ('u', 'delta', 'B', 'A')]
    session = export(
        lambda u, delta, B, A: ops.scan_states(u, delta, A, B),
        [scan_inputs(20, dtype=torch.float32)[index] for index in order],
        ((0, 1),) * 3,
    )
    for length in (20, 1, 2, 53):
        inputs = scan_inputs(length, dtype=torch.float32)
        actual = run(session, *(inputs[index] for index in order))
        assert relative_error(actual, scan_loop(*(x.double() for x in inputs))) < TOLERANCE


@pytest.mark.parametrize(
    ('orders', 'states'),
    [(('rows', 'columns', 'rows_backwards', 'columns_backwards'), 1), (('rows_snake', 'columns_snake'), 2)],
)
def test_selective_scan_on_any_grid(orders, states):
    arguments = orders_arguments(GRIDS[0], orders=len(orders), states=states, dtype=torch.float32)
    session = export(lambda *x: ops.selective_scan(*x, orders), arguments, ((0, 1, 2),) * 4)
    for batch, grid in zip((2, 1, 3, 2, 1, 2), GRIDS, strict=True):
        arguments = orders_arguments(grid, orders=len(orders), states=states, batch=batch, dtype=torch.float32)
        expected = orders_loop(*(x.double() for x in arguments), orders)
        assert relative_error(run(session, *arguments), expected) < TOLERANCE


def test_selective_scan_of_one_size():
    """Without a dynamic size the orders are numbers in the program."""
    arguments = orders_arguments((7, 1), dtype=torch.float32)
    session = export(ops.selective_scan, arguments, ())
    expected = orders_loop(*(x.double() for x in arguments), ('rows', 'columns', 'rows_backwards', 'columns_backwards'))
    assert relative_error(run(session, *arguments), expected) < TOLERANCE


def test_state_fusion_of_any_grid():
    taps = ssm_arguments((1, 1), dtype=torch.float32)[-1]
    session = export(ops.state_fusion, (torch.randn(2, 4, 5, 5), taps), ((0, 1, 2),))
    for grid in GRIDS:
        h = torch.randn(2, *grid, 5, generator=torch.Generator().manual_seed(0))
        assert relative_error(run(session, h, taps), ops.state_fusion(h.double(), taps.double())) < TOLERANCE


@pytest.mark.parametrize('options', [(1, 'silu', False, False), (1, 'none', False, True), (2, 'relu', True, False)])
def test_depthwise_conv_of_any_grid(options):
    named = dict(zip(('stride', 'activation', 'relu_input', 'residual'), options, strict=True))
    arguments = conv_arguments(GRIDS[0], dtype=torch.float32)
    session = export(lambda *tensors: ops.depthwise_conv(*tensors, **named), arguments, ((0, 1, 2),))
    for grid in GRIDS:
        arguments = conv_arguments(grid, dtype=torch.float32)
        expected = ops.depthwise_conv(*(x.double() for x in arguments), **named)
        assert relative_error(run(session, *arguments), expected) < TOLERANCE


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_fusion_taps(device):
    """On a CPU PyTorch's functions take the op's place: the translation serves what is exported on other devices."""
    kernels, alpha = fusion_weights(5, torch.float32)
    session = export(ops.fusion_taps, [x.to(device) for x in (*kernels, alpha)], ())
    assert relative_error(run(session, *kernels, alpha), ops.fusion_taps(*kernels, alpha)) < TOLERANCE


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('parameters', [0, 1, 2])
def test_layer_norm_of_any_grid(parameters, device):
    """On a CPU PyTorch's own layer takes the op's place: the translation serves what is exported on other devices."""

    def arguments_of(grid):
        x, _, *affine = norm_arguments(grid, dtype=torch.float32)
        return x, *affine[:parameters]

    session = export(ops.layer_norm, [x.to(device) for x in arguments_of(GRIDS[0])], ((0, 1, 2),))
    for grid in GRIDS:
        arguments = arguments_of(grid)
        expected = ops.layer_norm(*(x.double() for x in arguments))
        assert relative_error(run(session, *arguments), expected) < TOLERANCE


def test_gated_norm_of_any_grid():
    session = export(ops.gated_norm, norm_arguments(GRIDS[0], dtype=torch.float32), ((0, 1, 2),) * 2)
    for grid in GRIDS:
        arguments = norm_arguments(grid, dtype=torch.float32)
        expected = ops.gated_norm(*(x.double() for x in arguments))
        assert relative_error(run(session, *arguments), expected) < TOLERANCE


def test_decays_that_underflow_stay_finite(ssm):
    maps = {'u': torch.full((1, 7, 31, 5), 0.1), 'dt': torch.zeros(1, 7, 31, 2)}
    B = C = torch.ones(1, 7, 31, 1)
    A = torch.tensor([-100.0, -1e-6, -1e-3, -1.0, -9.0])
    taps = F.pad(torch.ones(1, 5), (0, 0, 0, 24))
    parameters = (torch.zeros(5, 2), torch.full((5,), 10.0), A, torch.zeros(5), taps)
    delta = torch.full((1, 217, 5), F.softplus(torch.tensor(10.0, dtype=torch.float64)).item(), dtype=torch.float64)
    expected = scan_loop(maps['u'].double().flatten(1, 2), delta, A.double(), torch.ones(1, 217, 1))
    actual = run(ssm, *maps.values(), B, C, *parameters).flatten(1, 2)
    for channel in range(5):
        assert relative_error(actual[..., channel], expected[..., channel]) < TOLERANCE


@pytest.mark.parametrize('windows', [(1, 1), (3, 2), (6, 6)])
def test_adaptive_pooling_of_any_size(windows):
    session = export(lambda x: F.adaptive_avg_pool2d(x, windows), (torch.randn(1, 3, 12, 12),), ((2, 3),))
    for size in ((12, 12), (7, 31), (3, 5), (1, 1), (13, 6)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        assert relative_error(run(session, x), F.adaptive_avg_pool2d(x.double(), windows)) < TOLERANCE


SIZES = ((2, 64, 96), (1, 224, 200), (3, 33, 130), (1, 32, 32), (1, 1, 1), (1, 4, 70))
"""Batch, height and width; the first is the exported one, the last three are too small to export at."""

BACKBONE_TOLERANCE = 3e-6
"""Ten times the largest relative error of a backbone's map, measured over SIZES: 3.0e-7."""


def build(arch):
    torch.manual_seed(0)
    return (VMamba if 'ssm_ratio' in arch else SpatialMamba)(arch, drop_path_rate=0.0).eval()


def images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def export_backbone(arch, size):
    model = build(arch)
    # Two of these names are those of values inside the translations too.
    return model, onnx_export.export_onnx(model, images(*size), ['a', 'state', 'c', 'd'])


@pytest.fixture(scope='module', params=[SMALL, {**SMALL, 'ssm_ratio': 2}], ids=['SpatialMamba', 'VMamba'])
def small(request):
    """A small backbone and its program."""
    return export_backbone(request.param, SIZES[0])


@torch.no_grad()
def worst_error(session, model, size):
    x = images(*size)
    outputs = session.run(None, {'image': x.numpy()})
    return max(relative_error(torch.from_numpy(one), other) for one, other in zip(outputs, model(x), strict=True))


def test_backbone_at_any_size(small):
    model, program = small
    session = open_session(program)
    assert [value.shape for value in session.get_inputs()] == [['batch', 3, 'height', 'width']]
    for size in SIZES:
        assert worst_error(session, model, size) < BACKBONE_TOLERANCE, size


def test_file_has_standard_operators_only(small):
    _, program = small
    assert {node.domain for node in program.model.graph.all_nodes()} == {''}
    assert not program.model.functions


def test_int8_dynamic_quantization(small, tmp_path):
    model, program = small
    program.save(tmp_path / 'model.onnx')
    quantization.quantize_dynamic(tmp_path / 'model.onnx', tmp_path / 'int8.onnx', op_types_to_quantize=['MatMul'])
    session = onnxruntime.InferenceSession(tmp_path / 'int8.onnx')
    error = worst_error(session, model, (1, 97, 130))
    assert 1e-4 < error < 0.03  # measured: 0.0029


def test_bad_examples_raise():
    with pytest.raises(ValueError, match=r'sides of at least 33, got \(2, 3, 32, 64\)'):
        onnx_export.export_onnx(build(SMALL), images(2, 32, 64), ['a'])
    with pytest.raises(ValueError, match='N of at least 2'):
        onnx_export.export_onnx(build(SMALL), images(1, 64, 64), ['a'])
    with pytest.raises(ValueError, match='evaluation mode'):
        onnx_export.export_onnx(build(SMALL).train(), images(2, 64, 64), ['a'])
    with pytest.raises(ValueError, match='must be layered, got a fused one'):
        onnx_export.export_onnx(fuse(build(SMALL)), images(2, 64, 64), ['a'])


def run_tool(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
    export_onnx.main()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('none.py',), 'none.py: expected a config file, found no such file'),
        (('none.py', '--shape', 32, 64), '--shape: expected a height and a width of at least 33 pixels, got [32, 64]'),
        (('none.py', '--out', 'none/a.onnx'), '--out: expected a file in an existing folder, found no folder none'),
        ((ROOT / 'configs/quickstart_mask_rcnn.py', 'none.pth'), 'none.pth'),
        (
            (ROOT / 'configs/quickstart_mask_rcnn.py', '--part', 'head', '--check', 'a.jpg'),
            '--check, --int8 and --max-detections are for whole detectors',
        ),
        ((ROOT / 'configs/quickstart_mask_rcnn.py', '--argmax'), 'expected a segmentor, found MaskRCNN'),
        ((ROOT / 'configs/quickstart_mask_rcnn.py', '--check', 'none.jpg'), 'none.jpg: expected an image'),
        (('none.py', '--max-detections', 0), '--max-detections: expected a positive number, got 0'),
        (
            (ROOT / 'configs/dino_sm_t.py',),
            'values of a tensor, which no exporter follows; --part backbone and --part head',
        ),
    ],
)
def test_bad_input_is_one_line(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, *args)
    (line,) = (capsys.readouterr().err if stop.value.code == 2 else stop.value.code).splitlines()[-1:]
    assert message in line


@pytest.mark.parametrize('name', ['onnxruntime', 'onnxscript'])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'mmspatialmamba.onnx_export')
    with pytest.raises(SystemExit, match=rf'expected the packages of requirements/export.txt, found .*{name}'):
        run_tool(monkeypatch, 'config.py')


@pytest.mark.end_to_end
def test_tiny():
    model, program = export_backbone('tiny', (2, 64, 96))
    session = open_session(program)
    for size in ((1, 224, 224), (2, 97, 250)):
        assert worst_error(session, model, size) < 1e-5  # measured at 224x224: 5.2e-7


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ('config', 'options', 'outputs'),
    [
        ('quickstart_mask_rcnn.py', ['--part', 'head'], [f'dense_{index}' for index in range(8)]),
        ('upernet_sm_t.py', [], ['logits']),
        ('upernet_sm_t.py', ['--argmax'], ['labels']),
        ('cls_sm_t.py', [], ['scores']),
    ],
)
def test_tool_exports_models(config, options, outputs, monkeypatch, capsys, tmp_path):
    path = tmp_path / 'config.py'
    small = {'backbone': {'arch': {'_delete_': True, 'embed_dims': 24, 'depths': (1, 1, 1, 1)}}}
    if 'upernet' in config:
        small |= {'decode_head': {'in_channels': [24, 48, 96, 192], 'channels': 16}, 'auxiliary_head': None}
    if 'cls' in config:
        small |= {'head': {'in_channels': 192}}
    path.write_text(f'_base_ = {str(ROOT / "configs" / config)!r}\nmodel = {small!r}\n')
    run_tool(monkeypatch, path, *options, '--out', tmp_path / 'model.onnx', '--shape', 64, 96)
    printed = capsys.readouterr().out
    differences = [float(line.rsplit(' ', 1)[1]) for line in printed.splitlines() if 'between' in line]
    assert len(differences) == 2
    assert np.max(differences) < export_onnx.TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    assert [value.name for value in session.get_outputs()] == outputs


@pytest.mark.end_to_end
def test_tool_fails_above_the_tolerance(monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, 'TOLERANCE', 1e-12)
    config = ROOT / 'configs/quickstart_mask_rcnn.py'
    with pytest.raises(SystemExit, match='expected the outputs of PyTorch within 1e-12, found a difference of'):
        run_tool(monkeypatch, config, '--part', 'backbone', '--out', tmp_path / 'a.onnx', '--shape', 64, 64)
