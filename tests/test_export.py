"""`torch.export` with dynamic sizes, AOTInductor, TorchScript and PyTorch's dynamic quantization of the backbone."""

import warnings

import pytest
import torch
from oracles import relative_error
from torch import nn
from torch.export import Dim

from mmspatialmamba import SpatialMamba

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}
SIZES = ((2, 64, 96), (1, 224, 200), (3, 33, 130))
"""Batch, height and width; the first is the exported one."""

TOLERANCE = 3e-6
"""Ten times the largest relative error of a traced float32 map, measured over SIZES: 3.0e-7."""


def build(arch=SMALL, **arguments):
    torch.manual_seed(0)
    return SpatialMamba(arch, drop_path_rate=0.0, **arguments).eval()


def images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_equal(forward, model, size, tolerance=TOLERANCE):
    for one, other in zip(forward(images(*size)), model(images(*size)), strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= tolerance


def export(model):
    with torch.no_grad():
        return torch.export.export(
            model, (images(*SIZES[0]),), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        )


@pytest.fixture(scope='module')
def exported():
    """A small backbone and its exported program."""
    model = build()
    return model, export(model)


def test_exported_program_takes_any_size(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2').module()
    for size in SIZES:
        assert_equal(loaded, model, size)


def test_exported_program_calls_the_op(exported):
    _, program = exported
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count('mmspatialmamba.structure_aware_ssm.default') == sum(SMALL['depths'])


def test_exported_program_refuses_what_it_cannot_do(exported):
    _, program = exported
    with pytest.raises(AssertionError, match=r'size\(\)\[2\] >= 33'):
        program.module()(images(2, 32, 64))


def test_trace_takes_any_size(tmp_path):
    model = build()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # torch.jit is deprecated, and the checks of shapes are not traced
        traced = torch.jit.trace(model, images(*SIZES[0]))
    traced.save(tmp_path / 'model.pt')
    loaded = torch.jit.load(tmp_path / 'model.pt')
    for size in SIZES:
        assert_equal(loaded, model, size)


@pytest.mark.parametrize('wrap', [lambda model: model, nn.Sequential])
def test_script_names_the_alternative(wrap):
    with pytest.raises(NotImplementedError, match=r'SpatialMamba: torch\.jit\.script .*use torch\.export'):
        torch.jit.script(wrap(build()))


def test_int8_dynamic_quantization_of_linear_layers():
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.ao.quantization is deprecated in favour of torchao
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layers = [module for module in quantized.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(layers) == 5 * sum(SMALL['depths'])
    assert_equal(quantized, model, (1, 97, 130), tolerance=0.03)  # measured: 0.0033


@pytest.mark.end_to_end
def test_aot_inductor_takes_any_size(tmp_path):
    model = build(out_indices=(0,))  # every stage compiles for tens of seconds
    program = export(model)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / 'model.pt2'),
            # Inductor's choice of layouts fails on the symbolic strides of the maps (PyTorch 2.13).
            inductor_configs={'layout_optimization': False},
        )
    loaded = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        assert_equal(loaded, model, size)


def test_fx_takes_the_backbone_as_a_leaf():
    model = nn.Sequential(build())
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, SpatialMamba) or super().is_leaf_module(module, name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    for size in SIZES:
        assert_equal(traced, model, size, tolerance=0)
