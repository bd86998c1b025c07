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


_ONE_AUTOCAST = VERSION >= (2, 4)  # a comparison of versions takes longer than the query that it chooses


def autocast_dtype(device: str) -> torch.dtype | None:
    """Returns autocast's dtype on a type of device, None where autocast is off (2.4: one query for all devices)."""
    if _ONE_AUTOCAST:
        known = device in ('cpu', 'cuda') or torch.amp.is_autocast_available(device)  # which dynamo of 2.6 cannot trace
        on = known and torch.is_autocast_enabled(device)
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
