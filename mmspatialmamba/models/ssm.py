"""The structure-aware state space model as a module."""

import math

import torch
import torch.nn as nn

from ..ops import fusion_taps, gated_norm, structure_aware_ssm
from .layers import DepthwiseConv


class StateFusion(nn.Module):
    """Holds the weights of the state fusion: three dilated depthwise kernels and one scale for each.

    Nothing is cached: `taps` merges the weights in every forward pass, so that training, loading and EMA take effect.

    Args:
        channels: Number of channels E.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv_d1 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.dwconv_d3 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.dwconv_d5 = nn.Parameter(torch.ones(channels, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def taps(self) -> torch.Tensor:
        """Returns the 25 merged taps, (25, E)."""
        return fusion_taps(self.dwconv_d1, self.dwconv_d3, self.dwconv_d5, self.alpha)


class StructureAwareSSM(nn.Module):
    """Structure-aware state space model with state size 1 (SSM of a Spatial-Mamba block).

    Computes ``out = (LN(y) · SiLU(z)) W_out`` with ``u, z = split(x W_in)``, ``u = SiLU(dwconv3x3(u))`` and
    ``y`` from `mmspatialmamba.ops.structure_aware_ssm`.

    Args:
        channels: Number of channels d of input and output. The inner width is E = 2d, the rank of the step size
            R = ceil(d / 16).
    """

    STEP_RANGE = (1e-3, 1e-1)
    """Range of the initial step size Δ at dt = 0, drawn log-uniformly."""

    FLOAT16_FACTOR = 2.0**-6
    """Factor on y in float16, which ends at 65504: with initial weights y passes that at u = 50, and grows as u^4.

    What the norm's eps of 1e-5 does not damp, from 3e-3 on, stays a normal number.
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
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.reset_step_size()

    @torch.no_grad()
    def reset_step_size(self) -> None:
        """Draws the projection of the step size uniformly and its bias so that Δ is log-uniform in ``STEP_RANGE``."""
        nn.init.uniform_(self.dt_weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(step) for step in self.STEP_RANGE)
        step = torch.empty_like(self.dt_bias).uniform_(low, high).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d), channels last."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.dwconv(u)
        dt, B, C = self.x_proj(u).split((self.rank, 1, 1), dim=-1)
        A = -torch.exp(self.A_log.flatten())
        D, taps, eps = self.D, self.state_fusion.taps(), self.norm.eps
        if u.dtype == torch.float16:
            # A power of two, and the norm's eps takes its square: the factor changes nothing but the range.
            D, taps, eps = self.FLOAT16_FACTOR * D, self.FLOAT16_FACTOR * taps, self.FLOAT16_FACTOR**2 * eps
        y = structure_aware_ssm(u, dt, B, C, self.dt_weight, self.dt_bias, A, D, taps)
        return self.out_proj(gated_norm(y, z, self.norm.weight, self.norm.bias, eps))
