"""`fusion_taps`: its formula, which devices other than the CPU use; values are compared in `test_state_fusion`."""

import pytest
import torch
from mmspatialmamba.ops import fusion_taps
from mmspatialmamba.ops.fusion_taps.reference import fusion_taps_backward_reference, fusion_taps_reference
from oracles import fusion_weights, require_grad


@pytest.mark.parametrize('channels', [1, 5, 37])
def test_backward_reference_is_the_derivative(channels):
    kernels, alpha = fusion_weights(channels)
    inputs = require_grad(*kernels, alpha)
    taps = fusion_taps_reference(*inputs)
    dtaps = torch.randn(taps.shape, generator=torch.Generator().manual_seed(0), dtype=taps.dtype)
    expected = torch.autograd.grad(taps, inputs, dtaps)
    for one, other in zip(fusion_taps_backward_reference(dtaps, *kernels, alpha), expected, strict=True):
        assert one.is_contiguous()
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_autograd_formula_of_other_devices():
    kernels, alpha = fusion_weights(5, torch.float32)
    inputs = [x.to('meta').requires_grad_() for x in (*kernels, alpha)]
    taps = fusion_taps(*inputs)
    assert 'Cat' not in type(taps.grad_fn).__name__
    assert taps.shape == (25, 5)
    for gradient, leaf in zip(torch.autograd.grad(taps.sum(), inputs), inputs, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype


def test_opcheck():
    kernels, alpha = fusion_weights(5)
    inputs = require_grad(*kernels, alpha)
    torch.library.opcheck(torch.ops.mmspatialmamba.fusion_taps.default, inputs)
    with torch.no_grad():
        dtaps = torch.ones(25, 5, dtype=torch.float64)
        torch.library.opcheck(torch.ops.mmspatialmamba.fusion_taps_backward.default, (dtaps, *kernels, alpha))


def test_mixed_dtypes_give_that_of_the_first_kernel():
    kernels, alpha = fusion_weights(5, torch.float32)
    expected = fusion_taps(*kernels, alpha)
    assert torch.equal(fusion_taps(kernels[0], *(kernel.double() for kernel in kernels[1:]), alpha.double()), expected)
