"""The one place where the ops meet PyTorch's dispatcher.

Each op has a schema, a fake kernel and, for a forward op, an autograd formula. The plain PyTorch reference is its
``CompositeExplicitAutograd`` kernel: the dispatcher falls back to it on every device that no compiled kernel serves.
"""

import warnings
from collections.abc import Callable

import torch

NAMESPACE = 'mmspatialmamba'
LIBRARY = torch.library.Library(NAMESPACE, 'DEF')

SLOW_REFERENCE_TOKENS = 16384
"""Number of tokens a sequence from which the reference warns that it is slow."""

_warned_devices: set[str] = set()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of state, fusion, observation and op parameters: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with ``x``: autocast's where that is on and x not float64, else its own."""
    if x.dtype != torch.float64 and _is_autocast_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_autocast_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def define(schema: str, reference: Callable, fake: Callable, slow: bool = True) -> None:
    """Defines an op from its schema, with the reference as the kernel of last resort.

    Args:
        schema: The op's schema, without namespace. Its first argument is a channels-last map or sequence.
        reference: Computes the op with plain PyTorch, below autograd.
        fake: Computes the outputs' shapes and dtypes only.
        slow: Whether the reference is so slow on long sequences that it warns.
    """
    name = schema.partition('(')[0]

    def kernel(*args):
        if slow:
            _warn_if_slow(name, args[0])
        device = args[0].device.type
        if not _is_autocast_on(device):
            return reference(*args)
        # The arguments have the dtypes to compute in, also where backward runs inside of an autocast context.
        with torch.autocast(device, enabled=False):
            return reference(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=LIBRARY)


def is_compiled(name: str, device: torch.device) -> bool:
    """Returns whether a compiled kernel, not the reference, serves an op on a device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return device.type != 'meta' and torch._C._dispatch_has_kernel_for_dispatch_key(f'{NAMESPACE}::{name}', key)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the autograd formula of an op that `define` has defined."""
    torch.library.register_autograd(f'{NAMESPACE}::{name}', backward, setup_context=setup_context, lib=LIBRARY)


def refuse_double_backward(name: str) -> None:
    """Makes a backward op raise, with its name, when somebody differentiates it."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f'{NAMESPACE}::{name} has no derivative: double backward is not supported')

    torch.library.register_autograd(f'{NAMESPACE}::{name}', backward, lib=LIBRARY)


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
