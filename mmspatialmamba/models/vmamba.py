"""The VMamba backbone.

Re-implemented from arXiv 2401.10166 (NeurIPS 2024) and from the behaviour of its published checkpoints, which load
under their own names (see `mmspatialmamba.checkpoint_names.vmamba`). It is the second generation of VMamba, whose state
space models have one state per channel and no gate.
"""

import math
from typing import ClassVar

import torch
import torch.nn as nn
from mmengine.registry import MODELS as ROOT_MODELS

from ..checkpoint_names import VMAMBA
from ..ops import selective_scan
from ..registry import MODELS
from .backbone import Backbone
from .layers import GELU, MLP, DepthwiseConv, DropPath, LayerNorm, draw_linear, draw_step_size


class VMambaStem(nn.Module):
    """Embeds an image at stride 4 by two overlapping convolutions.

    Args:
        in_channels: Number of image channels.
        channels: Number of output channels C; even.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, 2, 1)
        self.norm1 = LayerNorm(half)
        self.act = GELU()
        self.conv2 = nn.Conv2d(half, channels, 3, 2, 1)
        self.norm2 = nn.LayerNorm(channels)  # float32 under autocast on a GPU, and so the sums of the blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps an image (N, in_channels, H, W) to (N, ceil(H/4), ceil(W/4), C)."""
        x = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMambaDownsample(nn.Module):
    """Halves the grid and doubles the channels by an overlapping convolution.

    Args:
        channels: Number of input channels d.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.norm = nn.LayerNorm(2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, ceil(H/2), ceil(W/2), 2d)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SelectiveScan(nn.Module):
    """Step sizes, scans and their sum: `mmspatialmamba.ops.selective_scan` as a module, in the four orders of VMamba.

    It has no parameters of its own; a hook on it sees the arguments of the op and the observation y.
    """

    ORDERS = ('rows', 'columns', 'rows_backwards', 'columns_backwards')

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
    ) -> torch.Tensor:
        """Returns y, (N, H, W, E), from the arguments of the op, whose docstring gives their shapes."""
        return selective_scan(u, dt, B, C, dt_weight, dt_bias, A, D, orders=self.ORDERS)


class SS2D(nn.Module):
    """Selective scan of a map in four orders (SS2D of a VMamba block), with one state per channel and no gate.

    Computes ``out = LN(y) W_out`` with ``u = SiLU(dwconv3x3(x W_in))`` and ``y`` from
    `mmspatialmamba.ops.selective_scan`, the sum over the rows and columns of the map, each forwards and backwards.

    Args:
        channels: Number of channels d of input and output. The rank of the step sizes is R = ceil(d / 16).
        ratio: Inner channels E for each of these.
    """

    def __init__(self, channels: int, ratio: int):
        super().__init__()
        inner, orders = ratio * channels, len(SelectiveScan.ORDERS)
        self.orders = orders
        self.rank = math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, inner, bias=False)
        self.dwconv = DepthwiseConv(inner, activation='silu', bias=False)
        # Step size, B and C of each order after those of the order before: they belong to a position, so one product
        # computes all.
        self.x_proj = nn.Linear(inner, orders * (self.rank + 2), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(orders, inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(orders, inner))
        self.A_log = nn.Parameter(torch.zeros(orders * inner, 1))
        self.D = nn.Parameter(torch.ones(orders * inner))
        self.scan = SelectiveScan()
        self.norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        draw_step_size(self.dt_weight, self.dt_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        u = self.dwconv(self.in_proj(x))
        steps = self.x_proj(u).to(u.dtype).unflatten(-1, (self.orders, -1))
        dt, B, C = steps.split((self.rank, 1, 1), dim=-1)
        A, D = -torch.exp(self.A_log).view(*self.dt_bias.shape, 1), self.D.view_as(self.dt_bias)
        y = self.scan(u, dt, B, C, self.dt_weight, self.dt_bias, A, D)
        return self.out_proj(self.norm(y))


class VMambaBlock(nn.Module):
    """VMamba block: SS2D and MLP, each added to its input.

    Args:
        channels: Number of channels d.
        ratio: Inner channels of SS2D for each of these.
        drop_path_rate: Probability that SS2D or the MLP of an image is dropped in training.
    """

    def __init__(self, channels: int, ratio: int, drop_path_rate: float):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.ss2d = SS2D(channels, ratio)
        self.norm2 = LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        x = x + self.drop_path(self.ss2d(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@ROOT_MODELS.register_module()
@MODELS.register_module()
class VMamba(Backbone):
    """VMamba with multi-scale outputs; its arguments are those of `Backbone`.

    Architectures are 'tiny', 'small' and 'base' ('t', 's', 'b'), which are the paper's; 'tiny_s2l5', 'small_s1l20' and
    'base_s1l20', which its authors published too; or a dict with ``embed_dims``, ``depths`` and ``ssm_ratio``, the
    inner channels of a state space model for each channel of its map.
    """

    ARCHITECTURES: ClassVar[dict[str, dict]] = {
        'tiny': {'embed_dims': 96, 'depths': (2, 2, 8, 2), 'ssm_ratio': 1},
        'small': {'embed_dims': 96, 'depths': (2, 2, 15, 2), 'ssm_ratio': 2},
        'base': {'embed_dims': 128, 'depths': (2, 2, 15, 2), 'ssm_ratio': 2},
        'tiny_s2l5': {'embed_dims': 96, 'depths': (2, 2, 5, 2), 'ssm_ratio': 2},
        'small_s1l20': {'embed_dims': 96, 'depths': (2, 2, 20, 2), 'ssm_ratio': 1},
        'base_s1l20': {'embed_dims': 128, 'depths': (2, 2, 20, 2), 'ssm_ratio': 1},
    }
    NAMES = VMAMBA
    CORE_OP = 'selective_scan'
    PUBLISHED = 'vmamba://cls_vmamba_{arch}'

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> dict:
        arch = super()._parse_arch(arch)
        cls.check_int("arch['ssm_ratio']", arch['ssm_ratio'], 1)
        return arch

    def make_stem(self, in_channels: int, channels: int) -> VMambaStem:
        """Returns the convolutions before the first stage."""
        return VMambaStem(in_channels, channels)

    def make_block(self, channels: int, drop_path_rate: float) -> VMambaBlock:
        """Returns a block."""
        return VMambaBlock(channels, self.arch['ssm_ratio'], drop_path_rate)

    def make_downsample(self, channels: int) -> VMambaDownsample:
        """Returns what leads from one stage to the next."""
        return VMambaDownsample(channels)

    def reset_parameters(self) -> None:
        """Draws the weights of the linear layers of SS2D and MLP from a normal distribution of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, SS2D):
                draw_linear(module.in_proj, module.out_proj)
            elif isinstance(module, MLP):
                draw_linear(module.fc1, module.fc2)
