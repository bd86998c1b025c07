"""The structure-aware state space model as a module."""

import math

import torch
import torch.nn as nn

from ..ops import fusion_taps, gated_norm, ssm_layer, structure_aware_ssm
from ..ops.library import matmul_dtype
from ..ops.residual import add_branch
from .layers import DepthwiseConv, is_fusable


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

    Computes ``out = x + scale · (LN(y) · SiLU(z)) W_out`` with ``u, z = split(x W_in)``, ``u = SiLU(dwconv3x3(u))`` and
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

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the map plus its branch, (N, H, W, d), as one op where it can be, see `is_fusable`.

        Args:
            x: Map, (N, H, W, d).
            norm: What comes before the first projection.
            scale: Factor on the branch of each image, (N,); None for 1.
        """
        core = [self.dt_weight, self.dt_bias, -torch.exp(self.A_log.flatten()), self.D, self.state_fusion.taps()]
        out_norm, eps, dtype = self.norm, self.norm.eps, matmul_dtype(x)
        if dtype == torch.float16:
            # A power of two, and the norm's eps takes its square: the factor changes nothing but the range.
            core[-2:] = (self.FLOAT16_FACTOR * tensor for tensor in core[-2:])
            eps *= self.FLOAT16_FACTOR**2
        if is_fusable(norm, self.in_proj, self.dwconv, self.x_proj, self.out_proj):
            return ssm_layer(
                x, norm.weight, norm.bias, self.in_proj.weight, self.dwconv.weight, self.dwconv.bias,
                self.x_proj.weight, *core, out_norm.weight, out_norm.bias, self.out_proj.weight, scale,
                eps=norm.eps, out_eps=eps,
            )  # fmt: skip
        u, z = self.in_proj(norm(x)).chunk(2, dim=-1)
        u = self.dwconv(u)
        dt, B, C = self.x_proj(u).split((self.rank, 1, 1), dim=-1)
        y = structure_aware_ssm(u, dt, B, C, *core)
        return add_branch(x, self.out_proj(gated_norm(y, z, out_norm.weight, out_norm.bias, eps)), scale)
