"""`state_fusion` against three dilated convolutions: values, gradients, layouts, faults and errors."""

import pytest
import torch
from mmspatialmamba.ops import fusion_taps, state_fusion
from mmspatialmamba.ops.state_fusion.reference import state_fusion_reference
from mmspatialmamba.ops.state_fusion.taps import TAP_OFFSETS
from oracles import GRIDS, fusion_convolutions, fusion_weights, relative_error, require_grad

# Ten times the largest relative error measured over GRIDS, of the reference: float32 1.6e-7, bfloat16 3.2e-3,
# float16 3.4e-4 (the last two are the rounding of the output).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1.6e-6, torch.bfloat16: 3.2e-2, torch.float16: 3.4e-3}


def states(grid, channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, *grid, channels, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize('grid', GRIDS)
def test_reference_equals_the_convolutions(grid):
    kernels, alpha = fusion_weights(5)
    h = states(grid)
    actual = state_fusion_reference(h, fusion_taps(*kernels, alpha))
    assert relative_error(actual, fusion_convolutions(h, kernels, alpha)) < 1e-10


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('grid', GRIDS)
def test_op_equals_the_convolutions(grid, dtype):
    kernels, alpha = fusion_weights(5)
    h = states(grid, dtype=dtype)
    g = state_fusion(h, fusion_taps(*kernels, alpha))
    assert g.dtype == dtype
    assert g.is_contiguous()
    assert relative_error(g.double(), fusion_convolutions(h.double(), kernels, alpha)) < TOLERANCES[dtype]


@pytest.mark.parametrize('grid', GRIDS)
def test_gradients(grid):
    kernels, alpha = fusion_weights(2)

    def fuse(h, *weights):
        return state_fusion(h, fusion_taps(*weights))

    assert torch.autograd.gradcheck(fuse, require_grad(states(grid, 2), *kernels, alpha))


def test_opcheck():
    kernels, alpha = fusion_weights(5)
    arguments = tuple(require_grad(states((4, 5)), fusion_taps(*kernels, alpha)))
    torch.library.opcheck(torch.ops.mmspatialmamba.state_fusion.default, arguments)


def test_taps_are_the_25_distinct_ones():
    assert len(TAP_OFFSETS) == len(set(TAP_OFFSETS)) == 25
    kernels, alpha = fusion_weights(1)
    dense = torch.zeros(11, 11, dtype=torch.float64)
    for kernel, scale, dilation in zip(kernels, alpha, (1, 3, 5), strict=True):
        dense[5 - dilation : 6 + dilation : dilation, 5 - dilation : 6 + dilation : dilation] += scale * kernel[0, 0]
    taps = fusion_taps(*kernels, alpha)
    merged = torch.zeros_like(dense)
    for (y, x), tap in zip(TAP_OFFSETS, taps[:, 0], strict=True):
        merged[5 + y, 5 + x] = tap
    assert torch.allclose(merged, dense, rtol=1e-14, atol=0)


def test_layouts_of_the_inputs_do_not_matter():
    taps = fusion_taps(*fusion_weights(5)[0], fusion_weights(5)[1])
    h = states((7, 13))
    expected = state_fusion(h, taps)
    assert torch.equal(state_fusion(h.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), taps), expected)
    assert torch.equal(state_fusion(torch.cat((h, h), -1)[..., :5], taps), expected)
    expanded = h[:1].expand(2, -1, -1, -1)
    assert torch.equal(state_fusion(expanded, taps), state_fusion(expanded.contiguous(), taps))


def test_empty_batch():
    kernels, alpha = fusion_weights(5)
    h, taps = require_grad(states((3, 4))[:0], fusion_taps(*kernels, alpha))
    state_fusion(h, taps).sum().backward()
    assert h.grad.shape == (0, 3, 4, 5)
    assert torch.equal(taps.grad, torch.zeros_like(taps))


def test_zero_padding_is_noticed():
    kernels, alpha = fusion_weights(5)
    h = states((7, 13))
    faulty = fusion_convolutions(h, kernels, alpha, padding='constant')
    assert relative_error(state_fusion(h, fusion_taps(*kernels, alpha)), faulty) > TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ('h', 'taps', 'error', 'message'),
    [
        (torch.ones(2, 3, 4), torch.ones(25, 4), ValueError, r'h must have 4 dimensions, got shape \(2, 3, 4\)'),
        (torch.ones(2, 0, 4, 5), torch.ones(25, 5), ValueError, 'at least one token and one channel'),
        (torch.ones(2, 3, 4, 5), torch.ones(27, 5), ValueError, r'taps must have shape \(25, 5\), got \(27, 5\)'),
        (torch.ones(2, 3, 4, 5), None, TypeError, 'taps must be a tensor, got NoneType'),
    ],
)
def test_bad_arguments(h, taps, error, message):
    with pytest.raises(error, match=f'state_fusion: .*{message}'):
        state_fusion(h, taps)


def test_bad_kernels():
    kernels, alpha = fusion_weights(5)
    with pytest.raises(ValueError, match=r'fusion_taps: dwconv_d5 must have shape \(5, 1, 3, 3\), got \(4, 1, 3, 3\)'):
        fusion_taps(kernels[0], kernels[1], kernels[2][:4], alpha)
    with pytest.raises(ValueError, match=r'fusion_taps: alpha must have shape \(3,\), got \(2,\)'):
        fusion_taps(*kernels, alpha[:2])
