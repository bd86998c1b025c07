"""The fused core on the Triton kernels of the scan and of the fusion.

Forward moves, for each token and channel, u three times (carry, scan, observation), h twice and y once. h stands
between the scan and the fusion in float32 whatever the dtype of u: the fusion needs states up to five rows away, which
one program cannot hold, and to compute them again in blocks with a margin of five on each side would cost about twice
the exponentials. In a 16-bit dtype h would move 12 bytes rather than 16, but it would round the state, and overflow
float16 where the state grows.

Backward computes the states again. Of size HW·E, only h and its gradient exist, for its duration; nothing is kept.
"""

import torch

from ..scan_states.triton_kernels import Scan
from ..state_fusion.triton_kernels import fuse, fuse_backward
from ..triton_backend import register
from .reference import structure_aware_ssm_backward_reference, structure_aware_ssm_reference


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
    others = (dC, u.dtype), (dtaps, torch.float32)
    du, ddt, dB, dA, ddt_weight, ddt_bias, dD, dC, dtaps = scan.gradients(dh, h, dy, D, others)
    return du, ddt.view(dt.shape), dB.view(B.shape), dC.view(C.shape), ddt_weight, ddt_bias, dA, dD, dtaps


register('structure_aware_ssm', structure_aware_ssm, structure_aware_ssm_reference)
register('structure_aware_ssm_backward', structure_aware_ssm_backward, structure_aware_ssm_backward_reference)
