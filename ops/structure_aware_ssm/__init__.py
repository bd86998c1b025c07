"""The fused core of Spatial-Mamba: step size, selective scan, state fusion and observation as one op."""

import torch

from ..checks import check_like, check_not_empty, check_parameter, check_tensor, refuse_forward_mode
from ..library import accumulation_dtype, define, refuse_double_backward, register_autograd
from ..state_fusion.taps import TAP_OFFSETS
from .reference import structure_aware_ssm_backward_reference, structure_aware_ssm_reference


def structure_aware_ssm(
    u: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    taps: torch.Tensor,
) -> torch.Tensor:
    """Computes the structure-aware state space model over an image.

    With the tokens t = 1..HW in row-major order, for each channel e:

    1. Step size ``delta_t = softplus(dt_t · dt_weight_e + dt_bias_e)``.
    2. Scan ``h_t = exp(delta_t A_e) h_{t-1} + delta_t B_t u_t``, ``h_0 = 0`` (see `scan_states`).
    3. Fusion ``g = sum_k taps_k * h[at offset k]``, replicate padding (see `state_fusion`).
    4. Observation ``y = g C + D u``.

    Glossary, in the paper's letters: N images, H x W grid, E inner channels, R rank of the step size; Δ (``delta``)
    step size, A decay rate, B input weight, C output weight, D skip weight, h state. All are dimensionless.

    Args:
        u: Input, (N, H, W, E), channels last; float32, float64, bfloat16 or float16.
        dt: Low-rank step size, (N, H, W, R), dtype of ``u``.
        B: Input weight of each token, shared by all channels, (N, H, W, 1), dtype of ``u``.
        C: Output weight of each token, shared by all channels, (N, H, W, 1), dtype of ``u``.
        dt_weight: Projection of the step size, (E, R).
        dt_bias: Bias of the step size before softplus, (E,).
        A: Decay rate, (E,), negative.
        D: Skip weight, (E,).
        taps: Weights of the fusion, (25, E), from `fusion_taps`.

    Returns:
        y, (N, H, W, E), contiguous, dtype of ``u``.

    Raises:
        TypeError: An argument is no floating-point tensor, or dt, B or C has another dtype than ``u``.
        ValueError: An argument has another shape or device than stated above.
        NotImplementedError: An argument carries a tangent of forward-mode differentiation.

    Note:
        Autocast: the op is on no autocast list and runs in the dtype of ``u``; step size, state, fusion and
        observation accumulate in float32 (float64 for float64), and the five parameters are converted to that dtype.
        Backward keeps the inputs only: of size HW·E, that is u alone. Two runs give the same bits, forward and
        backward. No double backward.

        Source: arXiv 2410.15091, structure-aware state space model.
    """
    op = 'structure_aware_ssm'
    check_tensor(op, 'u', u, 4)
    check_not_empty(op, 'u', u)
    N, H, W, E = u.shape
    check_tensor(op, 'dt', dt, 4)
    R = dt.shape[-1]
    check_like(op, 'dt', dt, (N, H, W, R), u)
    check_like(op, 'B', B, (N, H, W, 1), u)
    check_like(op, 'C', C, (N, H, W, 1), u)
    parameters = (dt_weight, dt_bias, A, D, taps)
    names = ('dt_weight', 'dt_bias', 'A', 'D', 'taps')
    shapes = ((E, R), (E,), (E,), (E,), (len(TAP_OFFSETS), E))
    for name, parameter, shape in zip(names, parameters, shapes):
        check_parameter(op, name, parameter, shape, u)
    refuse_forward_mode(op, u, dt, B, C, *parameters)
    acc = accumulation_dtype(u.dtype)
    return torch.ops.mmspatialmamba.structure_aware_ssm(u, dt, B, C, *(p.to(acc) for p in parameters))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.mmspatialmamba.structure_aware_ssm_backward(dy, *ctx.saved_tensors)


_SHAPES = (
    'u: N H W E, dt: N H W R, B: N H W 1, C: N H W 1, dt_weight: E R, dt_bias: E, A: E, D: E,'
    f' taps: {len(TAP_OFFSETS)} E'
)

define(
    'structure_aware_ssm(Tensor u, Tensor dt, Tensor B, Tensor C, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D,'
    ' Tensor taps) -> Tensor',
    _SHAPES,
    structure_aware_ssm_reference,
    lambda u, *inputs: u.new_empty(u.shape),
)
define(
    'structure_aware_ssm_backward(Tensor dy, Tensor u, Tensor dt, Tensor B, Tensor C, Tensor dt_weight, Tensor dt_bias,'
    ' Tensor A, Tensor D, Tensor taps) -> (Tensor du, Tensor ddt, Tensor dB, Tensor dC, Tensor ddt_weight,'
    ' Tensor ddt_bias, Tensor dA, Tensor dD, Tensor dtaps)',
    f'dy: N H W E, {_SHAPES}',
    structure_aware_ssm_backward_reference,
    lambda dy, *inputs: tuple(x.new_empty(x.shape) for x in inputs),
)
register_autograd('structure_aware_ssm', _backward, _setup_context)
refuse_double_backward('structure_aware_ssm_backward')
