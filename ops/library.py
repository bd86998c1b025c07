"""The one place where the ops meet PyTorch's dispatcher.

Each op has a schema, a fake kernel and, for a forward op, an autograd formula. The plain PyTorch reference is its
``CompositeExplicitAutograd`` kernel: the dispatcher falls back to it on every device that no compiled kernel serves.
"""

import warnings
from collections.abc import Callable

import torch

from . import compat
from .backends import backends
from .checks import Shapes

NAMESPACE = 'mmspatialmamba'
LIBRARY = torch.library.Library(NAMESPACE, 'DEF')

RETIRED = {
    'selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B) -> Tensor': 'scan_states',
    'selective_scan_backward(Tensor dh, Tensor u, Tensor delta, Tensor A, Tensor B)'
    ' -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB)': 'scan_states_backward',
}
"""Schemas that older versions had, and what the op is called now.

An exported program stores name and overload of each op. These stay defined, only to raise: a new op of the same name
gets an overload of its own, such as ``selective_scan.orders``, so that an old program never runs it.
"""

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


def overload(name: str) -> torch._ops.OpOverload:
    """Returns an op by its name, which ends in that of its overload where it has one, such as 'scan.orders'."""
    packet, _, overload_name = name.partition('.')
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload_name or 'default')


def define(schema: str, shapes: str, reference: Callable, fake: Callable) -> None:
    """Defines an op from its schema, with the reference as the kernel of last resort.

    The first op that the reference computes because a compiled implementation is missing says so.

    Args:
        schema: The op's schema, without namespace. Its first argument is a channels-last map or sequence.
        shapes: The shape of each tensor of the schema, as `Shapes` reads them.
        reference: Computes the op with plain PyTorch, below autograd.
        fake: Computes the outputs' shapes and dtypes only.
    """
    name = schema.partition('(')[0]

    def kernel(*args):
        SHAPES[name].check(args)
        device = args[0].device.type
        _warn_if_slow(name, device)
        if compat.autocast_dtype(device) is None:
            return reference(*args)
        # The arguments have the dtypes to compute in, also where backward runs inside of an autocast context.
        with torch.autocast(device, enabled=False):
            return reference(*args)

    def checked_fake(*args):
        SHAPES[name].check_devices(args)
        return fake(*args)

    LIBRARY.define(schema)
    arguments = [argument.name for argument in overload(name)._schema.arguments]
    SHAPES[name] = Shapes(f'{NAMESPACE}::{name}', arguments, shapes)
    REFERENCES[name] = kernel
    LIBRARY.impl(name, kernel, 'CompositeExplicitAutograd')
    compat.register_fake(LIBRARY, name, checked_fake)


def define_retired() -> None:
    """Defines the ops of `RETIRED`, on every device and in every mode, as an error that says what to do."""
    for schema, successor in RETIRED.items():
        name = schema.partition('(')[0]

        def kernel(*args, schema=schema, name=name, successor=successor):
            raise RuntimeError(
                f'{NAMESPACE}::{name}: this program was exported by an older version of mmspatialmamba, in which '
                f'{NAMESPACE}::{schema} was what is {NAMESPACE}::{successor} now. Export the model again with this '
                'version, or run the program with the version that exported it.'
            )

        LIBRARY.define(schema)
        LIBRARY.impl(name, kernel, 'CompositeImplicitAutograd')


def is_compiled(name: str, device: torch.device) -> bool:
    """Returns whether a compiled kernel, not the reference, serves an op on a device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return device.type != 'meta' and torch._C._dispatch_has_kernel_for_dispatch_key(f'{NAMESPACE}::{name}', key)


def register_autograd(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Registers the autograd formula of an op that `define` has defined.

    `torch.library.register_autograd` (PyTorch 2.4) does the same and adds twice as much to the time of a call, 20
    instead of 10 us, which counts where a GPU waits for the processor.

    Args:
        name: The op's name.
        backward: Takes the context and the outputs' gradients, and returns those of the inputs.
        setup_context: Takes the context, the inputs and the output, and saves what backward needs.
    """
    op = overload(name)

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    formula = {'forward': staticmethod(forward), 'backward': staticmethod(backward)}
    function = type(f'{name}_derivative', (torch.autograd.Function,), formula)

    def kernel(*args):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op, kernel, 'Autograd')


def refuse_double_backward(name: str) -> None:
    """Makes a backward op raise, with its name, when somebody differentiates it."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f'{NAMESPACE}::{name} has no derivative: double backward is not supported')

    register_autograd(name, backward)


def _warn_if_slow(name: str, device: str) -> None:
    backend = backends().get(device)
    if device in _warned_devices or (backend and backend.implementation != 'reference'):
        return
    _warned_devices.add(device)
    reason = backend.reason if backend else 'there is no compiled implementation for it'
    warnings.warn(f'{NAMESPACE}::{name}: plain PyTorch computes the ops on {device}, slowly: {reason}', stacklevel=2)
