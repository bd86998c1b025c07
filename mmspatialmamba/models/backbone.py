"""What the backbones of this package share: arguments, stages and outputs, freezing, loading, depths of layers."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoint import Source
from ..checkpoint_names import BACKBONE_PREFIX, NameTable, find_table
from ..load_report import LoadReport, fit_state_dict
from ..ops.compat import OutOfMemoryError
from ..published import published_models


class Stage(nn.Module):
    """Blocks at one stride, and the downsample to the next stride if there is one.

    Args:
        blocks: Each maps (N, H, W, d) to the same shape.
        downsample: Maps (N, H, W, d) to (N, ceil(H/2), ceil(W/2), 2d); None in the last stage.
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the map of this stage and the input of the next.

        Args:
            x: Map, (N, H, W, d).
            recompute: Whether the blocks are computed again in backward, to save memory.

        Returns:
            The map after the blocks, (N, H, W, d), and after the downsample, (N, ceil(H/2), ceil(W/2), 2d), or None if
            there is none.
        """
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x, None if self.downsample is None else self.downsample(x)


class Backbone(BaseModule):
    """A stem and four stages of blocks, with multi-scale outputs.

    A subclass states `ARCHITECTURES`, `NAMES` and `CORE_OP`, and defines `make_stem`, `make_block`, `make_downsample`
    and `reset_parameters`. What looks at backbones (the swap, layer decay, inspection) relies on this class alone: on
    the submodules ``stem``, ``stages`` (each a `Stage`) and ``out_norms``, and on the attributes below. Maps between
    these are channels-last, (N, H, W, C).

    Args:
        arch: A name of `ARCHITECTURES` or its first letter (of several, the first that has it), or a dict with the
            same keys: ``embed_dims`` (channels C of the first stage, even), ``depths`` (number of blocks of each of the
            four stages), and what a subclass adds.
        in_channels: Number of image channels.
        out_indices: Stages (0 to 3, or -4 to -1) whose maps are returned, in this order. Stages after the last one
            are not built.
        drop_path_rate: Drop-path rate of the last block; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with their output norms: no
            gradients, and they stay in evaluation mode.
        norm_eval: Whether every BatchNorm stays in evaluation mode in training. Otherwise one does whose parameters
            were frozen while others of the backbone train: an adapter's file would not hold its statistics.
        with_cp: Whether blocks are computed again in backward to save memory (non-reentrant checkpointing).
        pretrained: Checkpoint, short for ``init_cfg=dict(type='Pretrained', checkpoint=…)``: its path, its address, or
            the name of a published model, such as ``spatialmamba://cls_sm_t``.
        init_cfg: MMEngine's initialization config. Initial values are set by the constructor; the published
            classification and detection files load as they are.

    Attributes:
        arch: The dict of the architecture.
        in_channels: As given.
        out_indices: As given, as a tuple of indices from 0.
        depths: Number of blocks of each of the four stages.
        channels: Number of channels of each stage's map.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: An argument has a value that is not allowed.
    """

    ARCHITECTURES: ClassVar[dict[str, dict]]
    """Architectures by name; all have the same keys."""

    NAMES: ClassVar[NameTable]
    """Parameter names in published files, and own ones."""

    CORE_OP: ClassVar[str]
    """Op of ``torch.ops.mmspatialmamba`` that each block calls once."""

    PUBLISHED: ClassVar[str] = ''
    """Name of the published ImageNet weights, with ``{arch}`` for the first letter of the architecture's name."""

    STRIDES = (4, 8, 16, 32)
    """Stride of each stage's map."""

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
                f'{self._name}: unknown argument {", ".join(sorted(unknown))}; allowed are '
                f'{", ".join(self._arguments())}. In a config that inherits another backbone, set _delete_=True.'
            )
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(f'{self._name}: expected pretrained or init_cfg, got both')
            if not isinstance(pretrained, str):
                raise TypeError(f'{self._name}: pretrained must be a path or None, got {type(pretrained).__name__}')
            init_cfg = {'type': 'Pretrained', 'checkpoint': pretrained}
        super().__init__(init_cfg)

        stages = len(self.STRIDES)
        self.arch = self._parse_arch(arch)
        self.check_int('in_channels', in_channels, 1)
        self.check_int('frozen_stages', frozen_stages, -1, stages)
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'{self._name}: drop_path_rate must be a number in [0, 1), got {drop_path_rate!r}')
        for name, flag in (('norm_eval', norm_eval), ('with_cp', with_cp)):
            if not isinstance(flag, bool):
                raise TypeError(f'{self._name}: {name} must be True or False, got {flag!r}')
        self.in_channels = in_channels
        self.out_indices = self._parse_out_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.depths = self.arch['depths']
        self.channels = tuple(self.arch['embed_dims'] * 2**i for i in range(stages))

        blocks, last = sum(self.depths), max(self.out_indices)
        rates = [drop_path_rate * k / (blocks - 1) for k in range(blocks)]
        self.stem = self.make_stem(in_channels, self.channels[0])
        self.stages = nn.ModuleList(
            Stage(
                (self.make_block(channels, rate) for rate in rates[sum(self.depths[:i]) : sum(self.depths[: i + 1])]),
                self.make_downsample(channels) if i < last else None,
            )
            for i, channels in enumerate(self.channels[: last + 1])
        )
        self.out_norms = nn.ModuleDict({str(i): nn.LayerNorm(self.channels[i]) for i in sorted(self.out_indices)})
        self.reset_parameters()
        self._freeze()

    def make_stem(self, in_channels: int, channels: int) -> nn.Module:
        """Returns what maps an image (N, in_channels, H, W) to (N, ceil(H/4), ceil(W/4), channels)."""
        raise NotImplementedError

    def make_block(self, channels: int, drop_path_rate: float) -> nn.Module:
        """Returns a block of a `Stage`, which maps (N, H, W, channels) to the same shape.

        Args:
            channels: Number of channels d.
            drop_path_rate: Drop-path rate of the block.
        """
        raise NotImplementedError

    def make_downsample(self, channels: int) -> nn.Module:
        """Returns the downsample of a `Stage` of that many channels."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Gives parameters the initial values that differ from those of their layers."""
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return type(self).__name__

    @classmethod
    def _arguments(cls) -> list[str]:
        """Returns the arguments of the constructor, those that a subclass adds first."""
        signatures = [inspect.signature(base.__init__) for base in cls.__mro__ if issubclass(base, Backbone)]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [p.name for signature in signatures for p in signature.parameters.values() if p.kind in named]
        return [name for name in dict.fromkeys(names) if name != 'self']

    @classmethod
    def check_int(cls, name: str, value: object, low: int, high: int | None = None) -> None:
        """Raises a ValueError that names the argument unless it is an integer from ``low`` to ``high``."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high):
            return
        allowed = f'an integer of at least {low}' if high is None else f'an integer from {low} to {high}'
        raise ValueError(f'{cls.__name__}: {name} must be {allowed}, got {value!r}')

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> dict:
        owner, stages = cls.__name__, len(cls.STRIDES)
        if isinstance(arch, str):
            names = {}
            for name in cls.ARCHITECTURES:
                names.setdefault(name, name)
                names.setdefault(name[0], name)
            if arch not in names:
                raise ValueError(f'{owner}: arch must be one of {", ".join(names)} or a dict, got {arch!r}')
            arch = cls.ARCHITECTURES[names[arch]]
        elif not isinstance(arch, dict):
            raise TypeError(f'{owner}: arch must be a name or a dict, got {type(arch).__name__}')
        keys = list(next(iter(cls.ARCHITECTURES.values())))
        if set(arch) != set(keys):
            expected, found = ' and '.join((', '.join(keys[:-1]), keys[-1])), ', '.join(map(str, arch)) or 'none'
            raise ValueError(f'{owner}: arch must have exactly the keys {expected}, got {found}')
        embed_dims, depths = arch['embed_dims'], arch['depths']
        cls.check_int("arch['embed_dims']", embed_dims, 2)
        if embed_dims % 2:
            raise ValueError(f"{owner}: arch['embed_dims'] must be even, got {embed_dims}")
        if not isinstance(depths, Sequence) or isinstance(depths, str) or len(depths) != stages:
            raise ValueError(f"{owner}: arch['depths'] must be {stages} integers, got {depths!r}")
        for depth in depths:
            cls.check_int("arch['depths']", depth, 1)
        return {**arch, 'depths': tuple(depths)}

    @classmethod
    def _parse_out_indices(cls, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        owner, stages = cls.__name__, len(cls.STRIDES)
        given = (out_indices,) if isinstance(out_indices, int) else out_indices
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError(f'{owner}: out_indices must be one or more integers, got {out_indices!r}')
        for index in given:
            cls.check_int('out_indices', index, -stages, stages - 1)
        indices = tuple(index % stages for index in given)
        if len(set(indices)) != len(indices):
            raise ValueError(f'{owner}: out_indices must name each stage once, got {out_indices!r}')
        return indices

    def init_weights(self) -> None:
        """Loads the checkpoint of ``init_cfg``, or says that there is none; called by MMEngine before training."""
        if not self.init_cfg:
            published = self._published_weights()
            recipe = f' The published recipe: pretrained={published!r}.' if published else ''
            print_log(
                f'{self._name}: no init_cfg, so the backbone starts from random weights unless load_from or resume '
                f'gives others.{recipe}',
                logger='current',
            )
        super().init_weights()

    def _published_weights(self) -> str | None:
        """Returns the name of the published ImageNet weights of this architecture and three image channels, or None."""
        letters = (name[0] for name in self.ARCHITECTURES)
        letter = next((letter for letter in letters if self._parse_arch(letter) == self.arch), None)
        if letter is None or self.in_channels != 3:
            return None
        name = self.PUBLISHED.format(arch=letter)
        return name if name in published_models() else None

    def train(self, mode: bool = True) -> 'Backbone':
        """Sets the mode, keeps frozen parts, and BatchNorm as ``norm_eval`` says, in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode:
            # Wholly frozen is the average of another network, whose BatchNorm follows the batch.
            has_adapters = any(parameter.requires_grad for parameter in self.parameters())
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    is_frozen = module.affine and not module.weight.requires_grad
                    if self.norm_eval or (is_frozen and has_adapters):
                        module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        norms = [norm for index, norm in self.out_norms.items() if int(index) < self.frozen_stages]
        for module in (self.stem, *self.stages[: self.frozen_stages], *norms):
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
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'{self._name}: expected an image batch (N, {self.in_channels}, H, W), got {tuple(x.shape)}'
            )
        try:
            return self._compute_maps(x)
        except RuntimeError as error:
            if isinstance(error, OutOfMemoryError) or 'DefaultCPUAllocator' in str(error):
                print_log(
                    f'{self._name}: out of memory for an image batch {tuple(x.shape)}. Lower the batch size or the '
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
            out, x = stage(x, recompute)
            if index in self.out_indices:
                maps[index] = self.out_norms[str(index)](out).permute(0, 3, 1, 2).contiguous()
        return tuple(maps[index] for index in self.out_indices)

    def __prepare_scriptable__(self):
        """Raises when `torch.jit.script` comes: it is deprecated, and compiles neither dicts of maps nor checkpointing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f'{self._name}: torch.jit.script is not supported; use torch.export.export, torch.compile or '
            'torch.jit.trace'
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
        source: Source | None = local_metadata.get(Source.KEY)
        subject = f'{self._name}: {source.file if source else "the state dict"}'
        self._refuse_other_networks(state_dict, prefix, subject)
        report = fit_state_dict(
            state_dict, prefix, self.state_dict(), self.NAMES, classifier=self.out_indices == (len(self.depths) - 1,)
        )
        # MMEngine only logs what does not fit, and a wrong file must not start a training from random weights.
        # A file of the backbone alone, or of nothing, has nothing for the rest of a model either.
        nothing = not prefix or (source is not None and (not source.names or self.NAMES.is_own(source.names)))
        if (not report.matched and (nothing or not report.absent)) or self._is_incomplete(report, prefix):
            raise RuntimeError(f'{subject} {report.describe()}')
        if report.absent:
            print_log(
                f'{subject} has no tensor under {prefix or "the name of the backbone"}: THE BACKBONE KEEPS THE WEIGHTS '
                'THAT IT HAS, random ones unless it was initialized from a file; the rest of the model is loaded.',
                logger='current',
                level=logging.WARNING,
            )
        else:
            print_log(f'{subject}: {report.describe()}', logger='current')
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _is_incomplete(self, report: LoadReport, prefix: str) -> bool:
        """Returns whether a published file lacks what this architecture has: it is damaged, or of another size.

        Output norms, which a classifier's file has not, may be missing, and so may what somebody added to the model.
        """
        missing = {name.removeprefix(prefix) for name in report.missing}
        missing = {name for name in missing if not name.startswith(self.NAMES.NORMS)}
        if not (report.is_published and missing):
            return False
        built_in = next(cls for cls in type(self).__mro__ if 'ARCHITECTURES' in vars(cls))
        with torch.device('meta'):
            return not missing.isdisjoint(built_in(self.arch, out_indices=self.out_indices).state_dict())

    def _refuse_other_networks(self, state_dict: Mapping, prefix: str, subject: str) -> None:
        """Raises a RuntimeError if what a state dict holds for this backbone are another network's weights.

        Where names and shapes agree in part, they would load by halves.
        """
        if not prefix and any(name.startswith(BACKBONE_PREFIX) for name in state_dict):
            prefix = BACKBONE_PREFIX
        entries = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        relative = self.NAMES.find_relative(entries)
        if relative is not None:
            raise RuntimeError(f'{subject} cannot be loaded: {relative}')
        if not self.NAMES.fits(entries) and find_table(entries) is not None:
            raise RuntimeError(
                f'{subject} holds another backbone of mmspatialmamba: expected names such as '
                f'{", ".join(self.NAMES.signature)}, found {", ".join(list(entries)[:3])}'
            )
