"""Checks of the public ops' arguments: each error names the op, the argument, what was expected and what was found."""

import torch
from torch.autograd import forward_ad

from .compat import is_compiling

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuse_forward_mode(op: str, *tensors: torch.Tensor) -> None:
    """Raises if a tensor carries a tangent: without a formula, PyTorch would go on with tangents of zero."""
    if is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f'{op}: forward-mode differentiation is not supported, use torch.autograd')


def check_tensor(op: str, name: str, value: object, ndim: int) -> None:
    """Raises unless ``value`` is a floating-point tensor of ``ndim`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f'{op}: {name} must be a tensor, got {type(value).__name__}')
    if value.dtype not in DTYPES:
        raise TypeError(f'{op}: {name} must have one of the dtypes {_names(DTYPES)}, got {value.dtype}')
    if value.ndim != ndim:
        raise ValueError(f'{op}: {name} must have {ndim} dimensions, got shape {tuple(value.shape)}')


def check_like(op: str, name: str, value: object, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raises unless ``value`` has the given shape and the dtype and device of ``like``."""
    check_parameter(op, name, value, shape, like)
    if value.dtype != like.dtype:
        raise TypeError(f'{op}: {name} must have the dtype of the first argument, {like.dtype}, got {value.dtype}')


def check_parameter(op: str, name: str, value: object, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raises unless ``value`` is a floating-point tensor of the given shape on the device of ``like``."""
    check_tensor(op, name, value, len(shape))
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f'{op}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}')
    if value.device != like.device:
        raise ValueError(f'{op}: {name} must be on the device of the first argument, {like.device}, got {value.device}')


def check_scale(op: str, scale: object, x: torch.Tensor) -> None:
    """Raises unless ``scale`` holds one factor for each image of ``x`` and needs no gradient."""
    check_parameter(op, 'scale', scale, x.shape[:1], x)
    if scale.requires_grad:
        raise ValueError(f'{op}: scale must not require a gradient, as backward computes none for it')


def check_not_empty(op: str, name: str, value: torch.Tensor) -> None:
    """Raises if any dimension of ``value`` but the batch is 0."""
    if 0 in value.shape[1:]:
        raise ValueError(f'{op}: {name} must have at least one token and one channel, got shape {tuple(value.shape)}')


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
