"""`torch.compile` of the backbone: one graph, one compilation for all sizes, outputs and gradients of eager mode."""

import pytest
import torch
from oracles import relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from mmspatialmamba import SpatialMamba

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}
SIZES = ((2, 64, 96), (3, 224, 200), (2, 97, 33), (4, 33, 130))

TOLERANCE = 3e-6
"""Ten times the largest relative error of a float32 map, measured with Inductor; other backends: 0. It was 2.9e-7."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def build(arch=SMALL, out_indices=(0, 1)):
    torch.manual_seed(0)
    return SpatialMamba(arch, out_indices=out_indices, drop_path_rate=0.0).eval()


def images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def mark_dynamic(x):
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, axis)


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < TOLERANCE


def assert_one_graph_serves_all_sizes(model, compiled, first):
    with torch.no_grad():
        assert_equal(compiled(first), model(first))
        with torch.compiler.set_stance('fail_on_recompile'):
            for size in SIZES[1:]:
                assert_equal(compiled(images(*size)), model(images(*size)))


@pytest.mark.parametrize('how', ['marked', 'dynamic'])
def test_dynamic_sizes_compile_once(how):
    model, first = build(), images(*SIZES[0])
    if how == 'marked':
        mark_dynamic(first)
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=True if how == 'dynamic' else None)
    assert_one_graph_serves_all_sizes(model, compiled, first)


def test_static_sizes_compile_once_each():
    model, compiler = build(), CompileCounterWithBackend('eager')
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for size in (*SIZES[:2], SIZES[0]):
            assert_equal(compiled(images(*size)), model(images(*size)))
    assert compiler.frame_count == 2


@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_of_training(with_cp):
    model = build().double()
    model.with_cp = with_cp
    model.train()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        sum((out**3).sum() for out in forward(images(2, 64, 64).double())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    # The bias before a BatchNorm has no gradient but rounding.
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-8)


@pytest.mark.end_to_end
def test_inductor_serves_all_sizes():
    model, first = build(out_indices=(0,)), images(*SIZES[0])
    mark_dynamic(first)
    # Inductor's choice of layouts fails on the symbolic strides of the maps (PyTorch 2.13).
    compiled = torch.compile(model, fullgraph=True, options={'layout_optimization': False})
    assert_one_graph_serves_all_sizes(model, compiled, first)
