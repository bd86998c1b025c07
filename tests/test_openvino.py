"""Exported files in OpenVINO: scans, backbones and whole models against PyTorch, and what the files keep to for it."""

from pathlib import Path

import onnx
import pytest
import torch
import torchvision_setup  # noqa: F401, before mmpretrain
from onnx import TensorProto, helper
from onnx_files import complaints, open_openvino
from oracles import Call, relative_error, scan_inputs, scan_loop, ssm_arguments

from mmspatialmamba import SpatialMamba, ops
from mmspatialmamba.inspection import build_model, read_config
from mmspatialmamba.onnx_export import TRANSLATIONS, export_onnx

ROOT = Path(__file__).parents[1]
DYNAMIC = torch.export.Dim.DYNAMIC

TOLERANCE = 1e-5
"""Largest relative error of an output; measured: 7.3e-7 (backbone T), 2.4e-6 (UPerNet T)."""


def export(function, arguments, axes):
    program = torch.onnx.export(
        Call(function).eval(),
        tuple(arguments),
        dynamo=True,
        verbose=False,
        dynamic_shapes=(tuple(dict.fromkeys(dynamic, DYNAMIC) for dynamic in axes),),
        custom_translation_table=TRANSLATIONS,
    )
    return program.model_proto


@pytest.fixture(scope='module')
def scan():
    """The scan of a sequence as a file: u, delta, B, A to h."""
    u, delta, A, B = scan_inputs(20, dtype=torch.float32)
    axes = ((0, 1),) * 3 + ((),)
    return export(lambda u, delta, B, A: ops.scan_states(u, delta, A, B), (u, delta, B, A), axes)


@pytest.fixture(scope='module')
def ssm():
    """The core of a block as a file."""
    axes = ((0, 1, 2),) * 4 + ((),) * 5
    return export(ops.structure_aware_ssm, ssm_arguments((4, 5), dtype=torch.float32), axes)


@pytest.mark.parametrize('name', ['scan', 'ssm'])
def test_files_keep_to_what_runtimes_take(name, request):
    model = request.getfixturevalue(name)
    assert complaints(model) == []
    assert [node.op_type for node in model.graph.node].count('Scan') == 2


def broken(fault):
    """Returns a file with one named fault."""
    graph = helper.make_graph
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ['n', 3]) for name in 'xy')
    untyped = [onnx.ValueInfoProto(name=name) for name in ('s', 'v')]
    typed = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ('s', 'v', 'new', 'out')]
    add = helper.make_node('Add', ['s', 'v'], ['new'])
    outputs = {'two outputs': 'new'}.get(fault, 's')
    body = graph(
        [add, helper.make_node('Identity', [outputs], ['out'])],
        'body',
        untyped if fault == 'no type' else typed[:2],
        typed[2:],
    )
    count = helper.make_tensor('k', TensorProto.INT64, [1], [2])
    nodes = [
        helper.make_node('Scan', ['x', 'x'], ['end', 'all'], body=body, num_scan_inputs=1),
        helper.make_node('Shape', ['x'], ['sizes']),
        helper.make_node('TopK', ['x', 'sizes' if fault == 'computed' else 'k'], ['best', 'index']),
        helper.make_node('Gelu', ['best'], ['y'], domain='com.microsoft' if fault == 'domain' else ''),
    ]
    return helper.make_model(graph(nodes, 'g', [x], [y], [count]))


@pytest.mark.parametrize('fault', ['no type', 'two outputs', 'computed', 'domain'])
def test_each_fault_of_a_file_is_found(fault):
    assert complaints(broken('none')) == []
    assert any(fault in line for line in complaints(broken(fault)))


@pytest.mark.parametrize('fixed', [False, True])
def test_scan_of_a_sequence(scan, fixed):
    for length in (20, 1, 53):
        u, delta, A, B = scan_inputs(length, dtype=torch.float32)
        inputs = [x.numpy() for x in (u, delta, B, A)]
        run = open_openvino(scan.SerializeToString(), *([x.shape for x in inputs] if fixed else []))
        (found,) = run(*inputs)
        expected = scan_loop(*(x.double() for x in (u, delta, A, B)))
        assert found.shape == tuple(expected.shape)
        assert relative_error(torch.from_numpy(found), expected) < TOLERANCE


@pytest.mark.parametrize('fixed', [False, True])
def test_core_on_grids(ssm, fixed):
    content = ssm.SerializeToString()
    grids = ((7, 13),) * 5 if fixed else ((4, 5), (1, 17), (19, 1), (7, 13), (7, 13))
    run = None
    for seed, grid in enumerate(grids):
        arguments = ssm_arguments(grid, dtype=torch.float32, seed=seed)
        if run is None:
            run = open_openvino(content, *([tuple(x.shape) for x in arguments] if fixed else []))
        (found,) = run(*(x.numpy() for x in arguments))
        expected = ops.structure_aware_ssm(*(x.double() for x in arguments))
        assert found.shape == tuple(expected.shape)
        assert relative_error(torch.from_numpy(found), expected) < TOLERANCE


@torch.no_grad()
def assert_equal(compute, run, shapes):
    """Expects PyTorch's outputs of images of each shape, one after the other."""
    for seed, shape in enumerate(shapes):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for found, expected in zip(run(images.numpy()), compute(images), strict=True):
            assert found.shape == tuple(expected.shape)
            assert relative_error(torch.from_numpy(found), expected) < TOLERANCE


def export_model(compute, model, count):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return compute(images)

    program = export_onnx(Whole().eval(), torch.randn(2, 3, 64, 96), [f'out_{index}' for index in range(count)])
    assert complaints(program.model_proto) == []
    return program.model_proto.SerializeToString()


def check_model(compute, model, count, size):
    """Five inputs of one size in a row, dynamic and with a fixed shape, and other sizes in between."""
    content = export_model(compute, model, count)
    height, width = size
    same = ((1, 3, height, width),) * 5
    assert_equal(compute, open_openvino(content), (*same[:3], (2, 3, width + 1, height - 21), *same[3:]))
    assert_equal(compute, open_openvino(content, same[0]), same)


def test_small_backbone():
    torch.manual_seed(0)
    model = SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 1, 1)}, drop_path_rate=0.0).eval()
    check_model(model, model, 4, (97, 70))


@pytest.mark.end_to_end
def test_backbone_t():
    torch.manual_seed(0)
    model = SpatialMamba('tiny', drop_path_rate=0.0).eval()
    check_model(model, model, 4, (201, 224))


@pytest.mark.end_to_end
@pytest.mark.parametrize('config', ['upernet_sm_t.py', 'cls_sm_t.py'])
def test_models_t(config):
    model = build_model(read_config(str(ROOT / 'configs' / config)))
    if 'upernet' in config:

        def compute(images):
            return (model.encode_decode(images, [{'img_shape': images.shape[2:]}]),)
    else:

        def compute(images):
            return (model(images, mode='tensor'),)

    check_model(compute, model, 1, (128, 160))
