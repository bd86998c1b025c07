"""What older versions of PyTorch lack. Each entry names the version that makes it unneeded."""

import importlib
from collections.abc import Callable

import torch

VERSION = torch.torch_version.TorchVersion(torch.__version__)


# 2.3: torch.compiler.is_compiling
is_compiling = torch.compiler.is_compiling if VERSION >= (2, 3) else torch._utils.is_compiling

# 2.5: torch.OutOfMemoryError
OutOfMemoryError = torch.OutOfMemoryError if VERSION >= (2, 5) else torch.cuda.OutOfMemoryError


def sharded_tensor() -> type[torch.Tensor]:
    """Returns the class of the tensors that FSDP shards (2.5: torch.distributed.tensor)."""
    name = 'tensor' if VERSION >= (2, 5) else '_tensor'
    return importlib.import_module(f'torch.distributed.{name}').DTensor


def autocast_dtype(device: str) -> torch.dtype | None:
    """Returns autocast's dtype on a type of device, None where autocast is off (2.4: one query for all devices)."""
    if VERSION >= (2, 4):
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if device == 'cuda' and torch.is_autocast_enabled() else None


def register_fake(library: torch.library.Library, name: str, fake: Callable) -> None:
    """Registers what computes an op's shapes alone (2.4: torch.library.register_fake)."""
    if VERSION >= (2, 4):
        torch.library.register_fake(f'{library.ns}::{name}', fake, lib=library)
    else:
        library.impl(name, fake, 'Meta')


def register_autograd(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    backward: Callable,
    setup_context: Callable | None = None,
) -> None:
    """Registers an op's derivative (2.4: torch.library.register_autograd)."""
    if VERSION >= (2, 4):
        torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)
        return

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    formula = {
        'forward': staticmethod(forward),
        'setup_context': staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        'backward': staticmethod(backward),
    }
    function = type(f'{op.name()}_derivative', (torch.autograd.Function,), formula)

    def kernel(*args):
        differentiated = torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in args
        )
        return function.apply(*args) if differentiated else forward(*args)

    library.impl(op, kernel, 'Autograd')
