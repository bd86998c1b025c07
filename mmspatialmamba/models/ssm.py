"""The structure-aware state space model as a module."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops import fusion_taps, gated_norm, structure_aware_ssm
from .layers import DepthwiseConv, draw_step_size


class StateFusion(nn.Module):
    """Three dilated depthwise kernels and one scale for each, which fuse the states of neighbours.

    Called, it merges them into the taps that the core takes. Nothing is cached: training, loading and EMA take effect.

    Args:
        channels: Number of channels E.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv_d1 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.dwconv_d3 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.dwconv_d5 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        """Returns the 25 merged taps, (25, E)."""
        return fusion_taps(self.dwconv_d1, self.dwconv_d3, self.dwconv_d5, self.alpha)


class Core(nn.Module):
    """Step size, scan, state fusion and observation: `mmspatialmamba.ops.structure_aware_ssm` as a module.

    It has no parameters of its own; a hook on it sees the arguments of the op and the observation y.
    """

    def forward(
        self,
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
        """Returns y, (N, H, W, E), from the arguments of the op, whose docstring gives their shapes."""
        return structure_aware_ssm(u, dt, B, C, dt_weight, dt_bias, A, D, taps)


class GatedNorm(nn.LayerNorm):
    """LayerNorm times SiLU of a gate, computed by `mmspatialmamba.ops.gated_norm`."""

    FLOAT16_FACTOR = 2.0**-6
    """Factor with which y comes in float16, which ends at 65504: with initial weights y passes that at u = 50, and
    grows as u^4. A power of two, and eps takes its square: the factor changes nothing but the range. What the norm's
    eps of 1e-5 does not damp, from 3e-3 on, stays a normal number.
    """

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Returns ``LN(y) · SiLU(z)``, (N, H, W, E), from y and the gate z of that shape."""
        z, eps = z.to(y.dtype), self.eps_for(y.dtype)
        if self.weight is None or self.bias is None:
            return F.layer_norm(y, self.normalized_shape, self.weight, self.bias, eps) * F.silu(z)
        return gated_norm(y, z, self.weight, self.bias, eps)

    def eps_for(self, dtype: torch.dtype) -> float:
        """Returns what is added to the variance of y as it comes in a dtype."""
        return self.eps * self.FLOAT16_FACTOR**2 if dtype == torch.float16 else self.eps


class StructureAwareSSM(nn.Module):
    """Structure-aware state space model with state size 1 (SSM of a Spatial-Mamba block).

    Computes ``out = (LN(y) · SiLU(z)) W_out`` with ``u, z = split(x W_in)``, ``u = SiLU(dwconv3x3(u))`` and ``y`` from
    `mmspatialmamba.ops.structure_aware_ssm`.

    Args:
        channels: Number of channels d of input and output. The inner width is E = 2d, the rank of the step size
            R = ceil(d / 16).
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = 2 * channels
        self.rank = math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.dwconv = DepthwiseConv(inner, activation='silu')
        self.x_proj = nn.Linear(inner, self.rank + 2, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.state_fusion = StateFusion(inner)
        self.core = Core()
        self.norm = GatedNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        draw_step_size(self.dt_weight, self.dt_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.dwconv(u)
        dt, B, C = self.x_proj(u).to(u.dtype).split((self.rank, 1, 1), dim=-1)
        y = self.core(u, dt, B, C, *self.core_weights(self.state_fusion(), u.dtype))
        return self.out_proj(self.norm(y, z))

    def core_weights(self, taps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Returns dt_weight, dt_bias, A, D and taps as the core takes them for maps of a dtype.

        Args:
            taps: What the state fusion returns, (25, E).
            dtype: Dtype of the maps. In float16 D and taps have the factor that the norm takes back.
        """
        D = self.D
        if dtype == torch.float16:
            factor = getattr(self.norm, 'FLOAT16_FACTOR', 1.0)  # another norm takes y as it is
            D, taps = factor * D, factor * taps
        return self.dt_weight, self.dt_bias, -torch.exp(self.A_log.flatten()), D, taps
