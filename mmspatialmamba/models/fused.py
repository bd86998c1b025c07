"""Spatial-Mamba with less time and memory, for who needs no layers inside.

Each branch of a block is one op, and so are the wide convolutions of a downsample.

A fused model has the parameters of the layered one, under the same names and in layers of the same classes: state
dicts, optimizers and weight decay know no difference. What it reads without calling is *held*: such a layer can be
neither called nor hooked nor replaced, and says so.
"""

import functools
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model.utils import _BatchNormXd

from ..ops import downsample, mlp, ssm_layer
from ..ops.compat import sharded_tensor
from ..ops.library import matmul_dtype
from .block import Block
from .layers import GELU, ConvNorm, Downsample, LayerNorm

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, _BatchNormXd)
"""BatchNorm as built, and what conversions to and from SyncBN make of it."""

EQUIVALENT = (BATCH_NORMS, (LayerNorm, nn.LayerNorm), (GELU, nn.GELU))
"""Classes that compute the same, so that either may be held."""

TENSORS = (nn.Parameter, torch.Tensor, sharded_tensor())
"""Classes of the tensors that a held layer may be given."""

READ_OPTIONS = {'eps', 'momentum', 'drop_prob', 'process_group'}
"""Options of held layers that a fused forward reads in each call, so that they may be set."""

HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class Held:
    """Mixin of layers whose weights a fused module reads instead of calling them.

    Tensors may be exchanged, moved and trained. Everything else that would go unnoticed is refused.
    """

    def compute(self, *args: torch.Tensor) -> torch.Tensor:
        """Computes what the layer computes."""
        return super().forward(*args)

    def forward(self, *args) -> NoReturn:
        """Refuses."""
        _refuse(self, 'call')

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._parameters or name in self._buffers:
            if type(value) not in TENSORS:
                _refuse(self, f'set {name} to a {type(value).__name__}')
        elif name == '__class__' or not (name.startswith('_') or name == 'training' or name in READ_OPTIONS):
            _refuse(self, f'set {name}')
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if not name.startswith('_'):
            _refuse(self, f'delete {name}')
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuses another module than the one that is there; conversions of norms visit all."""
        if self._modules.get(name) is not module:
            _refuse(self, f'replace {name}')

    def _refuse_registration(self, *args, **kwargs) -> NoReturn:
        _refuse(self, 'register a hook, a parameter or a buffer')

    register_forward_hook = register_forward_pre_hook = _refuse_registration
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse_registration
    register_parameter = register_buffer = _refuse_registration

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _new, (_original(self),), self.__dict__


class Holder(nn.Module):
    """Mixin of modules that hold some of their layers, which nothing may replace."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(self._modules.get(name), Held):
            _refuse(self._modules[name], 'replace')
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuses another module than the one that is there, where that is held."""
        if isinstance(self._modules.get(name), Held) and self._modules[name] is not module:
            _refuse(self._modules[name], 'replace')
        super().add_module(name, module)


class FusedBlock(Holder, Block):
    """Block whose two branches are the ops `mmspatialmamba.ops.ssm_layer` and `mmspatialmamba.ops.mlp`.

    The position encodings are layers as ever; `fuse` makes it of a `Block`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, H, W, d)."""
        x = self.compute_ssm(self.cpe1(x))
        return self.compute_mlp(self.cpe2(x))

    def compute_ssm(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` plus its state space branch, (N, H, W, d)."""
        norm, ssm, dtype = self.norm1, self.ssm, matmul_dtype(x)
        return ssm_layer(
            x, norm.weight, norm.bias, ssm.in_proj.weight, ssm.dwconv.weight, ssm.dwconv.bias, ssm.x_proj.weight,
            *ssm.core_weights(ssm.state_fusion.compute(), dtype), ssm.norm.weight, ssm.norm.bias, ssm.out_proj.weight,
            self._draw_scale(x), eps=norm.eps, out_eps=ssm.norm.eps_for(dtype),
        )  # fmt: skip

    def compute_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` plus its MLP branch, (N, H, W, d)."""
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        return mlp(
            x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self._draw_scale(x), eps=norm.eps
        )

    def _draw_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns the factor of drop path on the branch of each image, 0 or 1 / (1 - rate), (N,); None for 1."""
        if not (self.drop_path.training and self.drop_path.drop_prob):
            return None
        return self.drop_path.compute(x.new_ones(x.shape[0]))


class FusedDownsample(Holder, Downsample):
    """Downsample whose wide convolutions are the op `mmspatialmamba.ops.downsample`.

    The projection after them is a layer as ever; `fuse` makes it of a `Downsample`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, H, W, d) to (N, ceil(H/2), ceil(W/2), 2d)."""
        expand, conv = self.expand, self.dwconv
        x = downsample(x, expand.weight.flatten(1), expand.bias, conv.weight, conv.bias)
        return self.project(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FusedConvNorm(ConvNorm):
    """Convolution that takes scale and shift of its BatchNorm into its own weights where that uses running statistics.

    Both are computed anew in each call: training, loading and EMA take effect. `fuse` makes it of a `ConvNorm`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        norm, conv = self.norm, self.conv
        if norm.training:
            return norm.compute(conv.compute(x))
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, norm.bias - shift * scale, conv.stride, conv.padding)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._modules:
            _refuse(self._modules[name], 'replace')
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Holds a norm that a conversion to or from SyncBN made; refuses any other."""
        before = self._modules[name]
        if module is before:
            return
        if name != 'norm' or type(module) not in BATCH_NORMS:
            _refuse(before, 'replace')
        super().add_module(name, module)
        _hold(module, before._name)


FUSED = {Block: FusedBlock, Downsample: FusedDownsample, ConvNorm: FusedConvNorm}
CALLED = ('cpe1', 'cpe2', 'project')
"""Layers of a block and of a downsample that a fused one calls."""


def fuse(model: nn.Module) -> nn.Module:
    """Makes one op of each branch of each block and of the wide convolutions of each downsample, in place.

    In inference each convolution takes the BatchNorm after it into its weights.

    Parameters, their names and their values stay, so that it may be called before or after loading, before the
    optimizer is built or after, and at any place of a model; call it before `torch.compile` and export. Blocks that are
    fused already are left alone. `unfuse` takes it back.

    Args:
        model: A `SpatialMamba`, or a model with one inside, such as a detector.

    Returns:
        The model.

    Raises:
        ValueError: The model has no block of Spatial-Mamba, or a layer to fuse is not as built: of another class or
            with other options, with a hook, a parametrization or a tensor of a class of its own. It is named, and
            nothing is changed.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, tuple(FUSED))}
    if not any(isinstance(module, Block) for module in modules.values()):
        raise ValueError(f'fuse: expected a model with blocks of Spatial-Mamba, found none in {type(model).__name__}')
    layered = {name: module for name, module in modules.items() if type(module) not in FUSED.values()}
    for name, module in layered.items():
        _check(name, module)
    for name, module in layered.items():
        for path, layer in _layers_to_hold(module):
            _hold(layer, f'{name}.{path}' if name else path)
        module.__class__ = FUSED[type(module)]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Takes `fuse` back, in place: the modules of the model are called again, and may be hooked and replaced.

    Args:
        model: A model, fused or not.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, Held):
            del module.__dict__['_name']
            object.__setattr__(module, '__class__', _original(module))
        for plain, fused in FUSED.items():
            if type(module) is fused:
                module.__class__ = plain
    return model


def _layers_to_hold(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, layer) for path, layer in module.named_modules() if path and path.partition('.')[0] not in CALLED)


def _hold(layer: nn.Module, name: str) -> None:
    layer.__class__ = _held(type(layer))
    layer._name = name


@functools.cache
def _held(original: type[nn.Module]) -> type[nn.Module]:
    return type(f'Held{original.__name__}', (Held, original), {})


def _original(layer: nn.Module) -> type[nn.Module]:
    return type(layer).__bases__[1]


def _new(original: type[nn.Module]) -> nn.Module:
    """Returns a held layer without contents, which unpickling fills."""
    held = _held(original)
    return held.__new__(held)


def _refuse(layer: nn.Module, what: str) -> NoReturn:
    raise RuntimeError(
        f'{layer._name}: cannot {what}, since a fused module reads the weights of this {_original(layer).__name__} and '
        'does not call it. Call mmspatialmamba.unfuse(model) first, or build the backbone with fused=False.'
    )


def _check(name: str, module: nn.Module) -> None:
    """Raises unless all that `fuse` would hold of a module is as in one that was just built."""
    if type(module) not in FUSED:
        raise ValueError(f'fuse: {name} must be a {_kinds(FUSED)}, got {type(module).__name__}')
    built = _build_like(name, module)
    layers = dict(module.named_modules())
    if 'forward' in vars(module):
        raise ValueError(f'fuse: {name} must have the forward of its class, got one of its own')
    for path, twin in _layers_to_hold(built):
        full, layer = f'{name}.{path}' if name else path, layers.get(path)
        kinds = next((kinds for kinds in EQUIVALENT if type(twin) in kinds), (type(twin),))
        if type(layer) not in kinds:
            raise ValueError(f'fuse: {full} must be a {_kinds(kinds)}, got {type(layer).__name__}')
        if set(layer._modules) != set(twin._modules):
            raise ValueError(
                f'fuse: {full} must have the layers {", ".join(twin._modules)}, got {", ".join(layer._modules)}'
            )
        options, expected = _options(layer), _options(twin)
        for option in {**expected, **options}:
            if option not in expected or option not in options or options[option] != expected[option]:
                found, wanted = options.get(option, 'none'), expected.get(option, 'none')
                raise ValueError(f'fuse: {full}.{option} must be as built, {wanted!r}, got {found!r}')
        tensors = {**layer._parameters, **layer._buffers}
        for key, wanted in {**twin._parameters, **twin._buffers}.items():
            found = tensors.pop(key, None)
            if (wanted is None) != (found is None) or (
                found is not None and (type(found) is not type(wanted) or found.shape != wanted.shape)
            ):
                raise ValueError(f'fuse: {full}.{key} must be {_describe(wanted)}, got {_describe(found)}')
        if tensors:
            raise ValueError(
                f'fuse: {full} must have no tensor beside those it is built with, got {", ".join(tensors)}'
            )
        if any(getattr(layer, hooks) for hooks in HOOKS):
            raise ValueError(f'fuse: {full} must have no hook, got one')


def _build_like(name: str, module: nn.Module) -> nn.Module:
    with torch.device('meta'):
        if isinstance(module, Block):
            return Block(module.channels, 0.0)
        if isinstance(module, Downsample):
            return Downsample(_conv(name, module, 'expand').in_channels)
        conv = _conv(name, module, 'conv')
        (side, *_), (stride, *_) = conv.kernel_size, conv.stride
        return ConvNorm(conv.in_channels, conv.out_channels, side, stride, conv.bias is not None)


def _conv(name: str, module: nn.Module, path: str) -> nn.Conv2d:
    conv = getattr(module, path)
    if type(conv) is not nn.Conv2d:
        raise ValueError(f'fuse: {name}.{path} must be a Conv2d, got {type(conv).__name__}')
    return conv


def _options(layer: nn.Module) -> dict[str, object]:
    """Returns what is set on a layer, but what a fused forward reads anyway."""
    ignored = READ_OPTIONS | {'training'}
    return {name: value for name, value in vars(layer).items() if not name.startswith('_') and name not in ignored}


def _kinds(kinds) -> str:
    *names, last = (kind.__name__ for kind in kinds)
    return f'{", ".join(names)} or {last}' if names else last


def _describe(tensor: torch.Tensor | None) -> str:
    return 'None' if tensor is None else f'a {type(tensor).__name__} of shape {tuple(tensor.shape)}'
