"""The one place where the ops meet PyTorch's dispatcher.

Each op has a schema, a fake kernel and, for a forward op, an autograd formula. The plain PyTorch reference is its
``CompositeExplicitAutograd`` kernel: the dispatcher falls back to it on every device that no compiled kernel serves.
"""

import warnings
from collections.abc import Callable

import torch

from . import compat
from .checks import Shapes

NAMESPACE = 'mmspatialmamba'
LIBRARY = torch.library.Library(NAMESPACE, 'DEF')

SLOW_REFERENCE_TOKENS = 16384
"""Number of tokens a sequence from which the reference warns that it is slow."""

REFERENCES: dict[str, Callable] = {}
"""For each op the kernel of last resort, which checks its arguments."""
SHAPES: dict[str, Shapes] = {}
"""For each op the shapes of its tensors."""

_warned_devices: set[str] = set()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of state, fusion, observation and op parameters: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with ``x``: autocast's where that is on and x not float64, else its own."""
    return x.dtype if x.dtype == torch.float64 else compat.autocast_dtype(x.device.type) or x.dtype


def define(schema: str, shapes: str, reference: Callable, fake: Callable, slow: bool = True) -> None:
    """Defines an op from its schema, with the reference as the kernel of last resort.

    Args:
        schema: The op's schema, without namespace. Its first argument is a channels-last map or sequence.
        shapes: The shape of each tensor of the schema, as `Shapes` reads them.
        reference: Computes the op with plain PyTorch, below autograd.
        fake: Computes the outputs' shapes and dtypes only.
        slow: Whether the reference is so slow on long sequences that it warns.
    """
    name = schema.partition('(')[0]

    def kernel(*args):
        check_call(name, *args)
        if slow:
            _warn_if_slow(name, args[0])
        device = args[0].device.type
        if compat.autocast_dtype(device) is None:
            return reference(*args)
        # The arguments have the dtypes to compute in, also where backward runs inside of an autocast context.
        with torch.autocast(device, enabled=False):
            return reference(*args)

    def checked_fake(*args):
        SHAPES[name].check_devices(args)
        return fake(*args)

    LIBRARY.define(schema)
    arguments = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
    SHAPES[name] = Shapes(f'{NAMESPACE}::{name}', [argument.name for argument in arguments], shapes)
    REFERENCES[name] = kernel
    LIBRARY.impl(name, kernel, 'CompositeExplicitAutograd')
    compat.register_fake(LIBRARY, name, checked_fake)


def check_call(name: str, *args: object) -> None:
    """Raises unless an op's tensors have shapes that fit together and one device: anyone can call it by torch.ops."""
    SHAPES[name].check(args)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the autograd formula of an op that `define` has defined."""
    compat.register_autograd(LIBRARY, name, backward, setup_context)


def refuse_double_backward(name: str) -> None:
    """Makes a backward op raise, with its name, when somebody differentiates it."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f'{NAMESPACE}::{name} has no derivative: double backward is not supported')

    compat.register_autograd(LIBRARY, name, backward)


def _warn_if_slow(name: str, tensor: torch.Tensor) -> None:
    tokens = tensor.shape[1:-1].numel()
    device = tensor.device.type
    if tokens < SLOW_REFERENCE_TOKENS or device in _warned_devices:
        return
    _warned_devices.add(device)
    warnings.warn(
        f'{NAMESPACE}::{name}: the plain PyTorch reference serves a sequence of {tokens} tokens on {device}, which is '
        'slow. mmspatialmamba.ops.backends() says which compiled implementation is missing and why.',
        stacklevel=2,
    )
