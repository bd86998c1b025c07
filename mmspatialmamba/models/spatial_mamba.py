"""The Spatial-Mamba backbone.

Re-implemented from arXiv 2410.15091 (ICLR 2025) and from the behaviour of its published checkpoints, which load under
their own names (see `mmspatialmamba.checkpoint_names`).
"""

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoint import SourceMetadata
from ..checkpoint_names import adapt_state_dict
from ..ops.compat import OutOfMemoryError
from ..registry import MODELS
from .layers import MLP, DepthwiseConv, Downsample, Stem
from .ssm import StructureAwareSSM


class Block(nn.Module):
    """Spatial-Mamba block: position encoding, SSM, position encoding, MLP, each added to its input.

    Args:
        channels: Number of channels d.
        drop_path_rate: Probability that the SSM or the MLP of an image is dropped in training.
    """

    def __init__(self, channels: int, drop_path_rate: float):
        super().__init__()
        self.cpe1 = DepthwiseConv(channels, residual=True)
        self.norm1 = nn.LayerNorm(channels)
        self.ssm = StructureAwareSSM(channels)
        self.cpe2 = DepthwiseConv(channels, residual=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        x = self.ssm(self.cpe1(x), self.norm1, self._draw_scale(x))
        return self.mlp(self.cpe2(x), self.norm2, self._draw_scale(x))

    def _draw_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns the factor of drop path on the branch of each image, 0 or 1 / (1 - rate), (N,); None for 1."""
        if not self.training or not self.drop_path.drop_prob:
            return None
        return self.drop_path(x.new_ones(x.shape[0]))


class Stage(nn.Module):
    """Blocks at one stride, and the downsample to the next stride if there is one.

    Args:
        channels: Number of channels d.
        drop_path_rates: Drop-path rate of each block.
        downsample: Whether another stage follows.
    """

    def __init__(self, channels: int, drop_path_rates: Sequence[float], downsample: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, rate) for rate in drop_path_rates)
        self.downsample = Downsample(channels) if downsample else None


@ROOT_MODELS.register_module()
@MODELS.register_module()
class SpatialMamba(BaseModule):
    """Spatial-Mamba with multi-scale outputs.

    Args:
        arch: 'tiny', 'small' or 'base' ('t', 's', 'b'), or a dict with ``embed_dims`` (channels C of the first stage,
            even) and ``depths`` (number of blocks of each of the four stages).
        in_channels: Number of image channels.
        out_indices: Stages (0 to 3, or -4 to -1) whose maps are returned, in this order. Stages after the last one
            are not built.
        drop_path_rate: Drop-path rate of the last block; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages: no gradients, and their
            BatchNorm stays in evaluation mode.
        norm_eval: Whether every BatchNorm stays in evaluation mode in training.
        with_cp: Whether blocks are computed again in backward to save memory (non-reentrant checkpointing).
        pretrained: Path of a checkpoint, short for ``init_cfg=dict(type='Pretrained', checkpoint=…)``.
        init_cfg: MMEngine's initialization config. Initial values are set by the constructor; the published
            classification and detection files load as they are.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: An argument has a value that is not allowed.
    """

    ARCHITECTURES: ClassVar[dict[str, dict]] = {
        'tiny': {'embed_dims': 64, 'depths': (2, 4, 8, 4)},
        'small': {'embed_dims': 64, 'depths': (2, 4, 21, 5)},
        'base': {'embed_dims': 96, 'depths': (2, 4, 21, 5)},
    }
    STRIDES = (4, 8, 16, 32)

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.2,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        **unknown,
    ):
        if unknown:
            raise TypeError(
                f'SpatialMamba: unknown argument {", ".join(sorted(unknown))}; allowed are arch, in_channels, '
                'out_indices, drop_path_rate, frozen_stages, norm_eval, with_cp, pretrained and init_cfg. In a config '
                'that inherits another backbone, set _delete_=True.'
            )
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError('SpatialMamba: expected pretrained or init_cfg, got both')
            if not isinstance(pretrained, str):
                raise TypeError(f'SpatialMamba: pretrained must be a path or None, got {type(pretrained).__name__}')
            init_cfg = {'type': 'Pretrained', 'checkpoint': pretrained}
        super().__init__(init_cfg)

        embed_dims, depths = self._parse_arch(arch)
        _check_int('in_channels', in_channels, 1, None)
        _check_int('frozen_stages', frozen_stages, -1, len(depths))
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'SpatialMamba: drop_path_rate must be a number in [0, 1), got {drop_path_rate!r}')
        for name, flag in (('norm_eval', norm_eval), ('with_cp', with_cp)):
            if not isinstance(flag, bool):
                raise TypeError(f'SpatialMamba: {name} must be True or False, got {flag!r}')
        self.out_indices = self._parse_out_indices(out_indices, len(depths))
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.depths = depths
        self.channels = tuple(embed_dims * 2**i for i in range(len(depths)))
        """Number of channels of each stage's map."""

        blocks = sum(depths)
        rates = [drop_path_rate * k / (blocks - 1) for k in range(blocks)]
        last = max(self.out_indices)
        self.stem = Stem(in_channels, embed_dims)
        self.stages = nn.ModuleList(
            Stage(self.channels[i], rates[sum(depths[:i]) : sum(depths[: i + 1])], downsample=i < last)
            for i in range(last + 1)
        )
        self.out_norms = nn.ModuleDict({str(i): nn.LayerNorm(self.channels[i]) for i in sorted(self.out_indices)})
        self._reset_linear()
        self._freeze()

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> tuple[int, tuple[int, ...]]:
        if isinstance(arch, str):
            names = {alias: name for name in cls.ARCHITECTURES for alias in (name, name[0])}
            if arch not in names:
                raise ValueError(f'SpatialMamba: arch must be one of {", ".join(names)} or a dict, got {arch!r}')
            arch = cls.ARCHITECTURES[names[arch]]
        elif not isinstance(arch, dict):
            raise TypeError(f'SpatialMamba: arch must be a name or a dict, got {type(arch).__name__}')
        if set(arch) != {'embed_dims', 'depths'}:
            raise ValueError(
                f'SpatialMamba: arch must have exactly the keys embed_dims and depths, got {", ".join(map(str, arch))}'
            )
        embed_dims, depths = arch['embed_dims'], arch['depths']
        _check_int("arch['embed_dims']", embed_dims, 2, None)
        if embed_dims % 2:
            raise ValueError(f"SpatialMamba: arch['embed_dims'] must be even, got {embed_dims}")
        if not isinstance(depths, Sequence) or isinstance(depths, str) or len(depths) != len(cls.STRIDES):
            raise ValueError(f"SpatialMamba: arch['depths'] must be {len(cls.STRIDES)} integers, got {depths!r}")
        for depth in depths:
            _check_int("arch['depths']", depth, 1, None)
        return embed_dims, tuple(depths)

    @staticmethod
    def _parse_out_indices(out_indices: int | Sequence[int], stages: int) -> tuple[int, ...]:
        given = (out_indices,) if isinstance(out_indices, int) else out_indices
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError(f'SpatialMamba: out_indices must be one or more integers, got {out_indices!r}')
        for index in given:
            _check_int('out_indices', index, -stages, stages - 1)
        indices = tuple(index % stages for index in given)
        if len(set(indices)) != len(indices):
            raise ValueError(f'SpatialMamba: out_indices must name each stage once, got {out_indices!r}')
        return indices

    def _reset_linear(self) -> None:
        for module in self.modules():
            if isinstance(module, StructureAwareSSM):
                linears = (module.in_proj, module.out_proj)
            elif isinstance(module, MLP):
                linears = (module.fc1, module.fc2)
            else:
                continue
            for linear in linears:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def init_weights(self) -> None:
        """Loads the checkpoint of ``init_cfg``, or says that there is none; called by MMEngine before training."""
        if not self.init_cfg:
            print_log(
                'SpatialMamba: no init_cfg, so the backbone starts from random weights unless load_from or resume '
                'gives others.',
                logger='current',
            )
        super().init_weights()

    def train(self, mode: bool = True) -> 'SpatialMamba':
        """Sets the mode, keeps frozen parts and, with ``norm_eval``, every BatchNorm in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.stem, *self.stages[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Computes the maps of the stages named by ``out_indices``.

        Args:
            x: Image batch, (N, in_channels, H, W), any H and W of at least 1.

        Returns:
            One contiguous map (N, C·2^i, ceil(H/2^(i+2)), ceil(W/2^(i+2))) for each index i.

        Raises:
            ValueError: The shape of ``x`` is not the one stated above.
        """
        expected = self.stem.reduce.conv.in_channels
        if x.ndim != 4 or x.shape[1] != expected or 0 in x.shape[2:]:
            raise ValueError(f'SpatialMamba: expected an image batch (N, {expected}, H, W), got {tuple(x.shape)}')
        try:
            return self._compute_maps(x)
        except RuntimeError as error:
            if isinstance(error, OutOfMemoryError) or 'DefaultCPUAllocator' in str(error):
                print_log(
                    f'SpatialMamba: out of memory for an image batch {tuple(x.shape)}. Lower the batch size or the '
                    'size of the images, set with_cp=True on the backbone, or train with --amp.',
                    logger='current',
                    level=logging.ERROR,
                )
            raise

    def _compute_maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = {}
        recompute = self.with_cp and torch.is_grad_enabled()
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if index in self.out_indices:
                maps[index] = self.out_norms[str(index)](x).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps[index] for index in self.out_indices)

    def __prepare_scriptable__(self):
        """Raises when `torch.jit.script` comes: it is deprecated, and compiles neither dicts of maps nor checkpointing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            'SpatialMamba: torch.jit.script is not supported; use torch.export.export, torch.compile or torch.jit.trace'
        )

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Returns the depth of a parameter, for layer-wise learning-rate decay; mmpretrain calls it too.

        The stem is layer 0 and each block a layer; a downsample belongs to the block before it. Output norms and what
        does not belong to the backbone, such as a head, are the last layer.

        Args:
            param_name: Name of the parameter in the model.
            prefix: What the names of the backbone's parameters begin with in the model, 'backbone.' for instance.

        Returns:
            The layer, and the number of layers: two more than the backbone has blocks.
        """
        layers = sum(len(stage.blocks) for stage in self.stages) + 2
        if not param_name.startswith(prefix):
            return layers - 1, layers
        part, *inner = param_name.removeprefix(prefix).split('.')
        if part == 'stem':
            return 0, layers
        if part != 'stages':
            return layers - 1, layers
        stage = int(inner[0])
        block = int(inner[2]) if inner[1] == 'blocks' else self.depths[stage] - 1
        return sum(self.depths[:stage]) + block + 1, layers

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own = {prefix + name: tensor.shape for name, tensor in self.state_dict().items()}
        report = adapt_state_dict(state_dict, prefix, own, classifier=self.out_indices == (len(self.depths) - 1,))
        source = local_metadata.get(SourceMetadata.KEY)
        # MMEngine only logs what does not fit, and a wrong file must not start a training from random weights. A state
        # dict that is no file's may leave the backbone out.
        if not report.matched and (source or report.unexpected or report.mismatched):
            raise RuntimeError(report.describe(source))
        print_log(report.describe(source), logger='current')
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high):
        return
    allowed = f'an integer of at least {low}' if high is None else f'an integer from {low} to {high}'
    raise ValueError(f'SpatialMamba: {name} must be {allowed}, got {value!r}')
