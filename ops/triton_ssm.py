"""The fused core on Triton kernels, and the registration of all Triton implementations for CUDA devices.

Forward moves, for each token and channel, u three times (carry, scan, observation), h twice and y once. h stands
between the scan and the fusion in float32 whatever the dtype of u: the fusion needs states up to five rows away, which
one program cannot hold, and to compute them again in blocks with a margin of five on each side would cost about twice
the exponentials. In a 16-bit dtype h would move 12 bytes rather than 16, but it would round the state, and overflow
float16 where the state grows.

Backward computes the states again. Of size HW·E, only h and its gradient exist, for its duration; nothing is kept.
"""

import functools

import torch

from .gated_norm import gated_norm_backward_reference, gated_norm_reference
from .library import LIBRARY
from .selective_scan import selective_scan_backward_reference, selective_scan_reference
from .state_fusion import state_fusion_backward_reference, state_fusion_reference
from .structure_aware_ssm import structure_aware_ssm_backward_reference, structure_aware_ssm_reference
from .triton_fusion import fuse, fuse_backward, state_fusion, state_fusion_backward
from .triton_gated_norm import gated_norm, gated_norm_backward
from .triton_scan import Scan, selective_scan, selective_scan_backward


def structure_aware_ssm(u, dt, B, C, dt_weight, dt_bias, A, D, taps) -> torch.Tensor:
    """Computes the op `structure_aware_ssm`."""
    u = u.contiguous()
    h = Scan(u, dt, B, A, dt_weight, dt_bias).states(torch.float32)
    return fuse(h, taps, u.dtype, C, u, D)


def structure_aware_ssm_backward(dy, u, dt, B, C, dt_weight, dt_bias, A, D, taps) -> tuple[torch.Tensor, ...]:
    """Computes the op `structure_aware_ssm_backward`, from the inputs alone."""
    dy, u = dy.contiguous(), u.contiguous()
    scan = Scan(u, dt, B, A, dt_weight, dt_bias)
    h = scan.states(torch.float32)
    dh, dtaps, dC = fuse_backward(dy, h, taps, torch.float32, C)
    du, ddt, dB, dA, ddt_weight, ddt_bias, dD = scan.gradients(dh, h, dy, D)
    dC = dC.to(u.dtype)
    return du, ddt.view(dt.shape), dB.view(B.shape), dC.view(C.shape), ddt_weight, ddt_bias, dA, dD, dtaps


IMPLEMENTATIONS = {
    'gated_norm': (gated_norm, gated_norm_reference),
    'gated_norm_backward': (gated_norm_backward, gated_norm_backward_reference),
    'selective_scan': (selective_scan, selective_scan_reference),
    'selective_scan_backward': (selective_scan_backward, selective_scan_backward_reference),
    'state_fusion': (state_fusion, state_fusion_reference),
    'state_fusion_backward': (state_fusion_backward, state_fusion_backward_reference),
    'structure_aware_ssm': (structure_aware_ssm, structure_aware_ssm_reference),
    'structure_aware_ssm_backward': (structure_aware_ssm_backward, structure_aware_ssm_backward_reference),
}
"""For each op, what computes it with Triton kernels and with plain PyTorch."""


@functools.cache
def register() -> None:
    """Registers the implementations for CUDA devices; a second call changes nothing."""
    for name, (kernels, reference) in IMPLEMENTATIONS.items():
        LIBRARY.impl(name, _implementation(kernels, reference), 'CUDA')


def _implementation(kernels, reference):
    """Returns the CUDA implementation of an op.

    The reference serves what the kernels do not: float64, as they accumulate in float32 (gradcheck needs it, no user
    trains in it), and an empty batch, as a grid of no programs cannot be launched.
    """

    def implementation(first, *others):
        if first.dtype == torch.float64 or first.numel() == 0:
            return reference(first, *others)
        # Triton launches on the current stream of the current device, which need not be that of the tensors.
        with torch.cuda.device_of(first):
            return kernels(first, *others)

    return implementation
