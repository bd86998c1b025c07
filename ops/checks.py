"""Checks of the public ops' arguments: each error names the op, the argument, what was expected and what was found."""

import functools

import torch
from torch.autograd import forward_ad

from .compat import is_compiling

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Shapes:
    """The shapes of an op's tensors, for the implementations in Python; those in C++ check for themselves.

    Args:
        op: The op's name, for errors.
        arguments: The names of its arguments, in order.
        shapes: The dimensions of its tensors, such as 'u: N L E, A: E, B: N L 1, scale?: N'. A word stands for one
            size in all of them, '...' before it for any sizes, the same in all; a name with ? may be None. Of the sizes
            of the first tensor only the first, the batch, may be 0.
    """

    def __init__(self, op: str, arguments: list[str], shapes: str):
        self.op = op
        self.tensors = []
        self.optional = set()
        for entry in shapes.split(','):
            name, dimensions = entry.split(':')
            name = name.strip()
            if name.endswith('?'):
                name = name[:-1]
                self.optional.add(name)
            sizes = tuple(int(size) if size.isdigit() else size for size in dimensions.split())
            self.tensors.append((arguments.index(name), name, sizes))
        self._check_shapes_once = functools.lru_cache(maxsize=256)(self._check_shapes)

    def check(self, args: tuple) -> None:
        """Raises unless the tensors among an op's arguments are there, on one device and of these shapes."""
        self.check_devices(args)
        self._check_shapes(self._shapes(args))

    def check_again(self, args: tuple) -> None:
        """Does what `check` does, in a fifth of the time for shapes that have passed; all sizes are numbers."""
        self.check_devices(args)
        self._check_shapes_once(self._shapes(args))

    def _shapes(self, args: tuple) -> tuple[torch.Size | None, ...]:
        return tuple(None if args[i] is None else args[i].shape for i, _, _ in self.tensors)

    def _check_shapes(self, shapes: tuple[torch.Size | None, ...]) -> None:
        """Raises unless these are shapes of the tensors."""
        known = {}
        for (_, name, sizes), shape in zip(self.tensors, shapes):
            if shape is None:
                continue
            if not known and 0 in shape[1:]:
                raise ValueError(_empty(self.op, name, shape))
            shape = found = tuple(shape)
            if sizes[0] == '...':
                leading = max(0, len(shape) - len(sizes) + 1)
                found = (shape[:leading], *shape[leading:])
            expected = tuple(known.get(size, size) for size in sizes)
            if len(found) != len(sizes) or any(
                want != size and not isinstance(want, str) for want, size in zip(expected, found)
            ):
                raise ValueError(f'{self.op}: {name} must have shape {_written(expected)}, got {shape}')
            known.update(zip(sizes, found))

    def check_devices(self, args: tuple) -> None:
        """Raises unless the tensors among an op's arguments are there and on one device."""
        device = None
        for position, name, _ in self.tensors:
            tensor = args[position]
            if tensor is None:
                if name not in self.optional:
                    raise TypeError(f'{self.op}: {name} must be a tensor, got None')
            elif device is None:
                device = tensor.device
            elif tensor.device != device:
                raise ValueError(
                    f'{self.op}: {name} must be on the device of the first tensor, {device}, got {tensor.device}'
                )


def refuse_forward_mode(op: str, *tensors: torch.Tensor) -> None:
    """Raises if a tensor carries a tangent: without a formula, PyTorch would go on with tangents of zero."""
    if is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f'{op}: forward-mode differentiation is not supported, use torch.autograd')


def check_tensor(op: str, name: str, value: object, ndim: int | None = None) -> None:
    """Raises unless ``value`` is a floating-point tensor of ``ndim`` dimensions, None for any number of them."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f'{op}: {name} must be a tensor, got {type(value).__name__}')
    if value.dtype not in DTYPES:
        raise TypeError(f'{op}: {name} must have one of the dtypes {_names(DTYPES)}, got {value.dtype}')
    if ndim is not None and value.ndim != ndim:
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
        raise ValueError(_empty(op, name, value.shape))


def _empty(op: str, name: str, shape: torch.Size) -> str:
    return f'{op}: {name} must have at least one token and one channel, got shape {tuple(shape)}'


def _written(sizes: tuple[int | str | tuple[int, ...], ...]) -> str:
    sizes = sum((size if isinstance(size, tuple) else (size,) for size in sizes), ())
    return f'({", ".join(map(str, sizes))}{"," if len(sizes) == 1 else ""})'


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
