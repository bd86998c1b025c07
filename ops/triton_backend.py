"""What the Triton implementations of all ops share: their registration for CUDA devices and the layout they take."""

from collections.abc import Callable

import torch

from . import compat
from .backends import backends, give_up
from .library import LIBRARY, REFERENCES, SHAPES

IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {}
"""For each registered op, what computes it with Triton kernels and with plain PyTorch."""


def register(name: str, kernels: Callable, reference: Callable) -> None:
    """Registers an op's Triton implementation for CUDA devices.

    The reference serves what the kernels do not: float64, as they accumulate in float32 (gradcheck needs it, no user
    trains in it), and an empty batch, as a grid of no programs cannot be launched. It serves all ops from the moment on
    when the first launch of one fails: kernels are compiled then, which can miss a C compiler or meet a GPU that
    Triton cannot compile for. Out of memory, and an error inside of a CUDA graph's capture, are raised.
    """
    IMPLEMENTATIONS[name] = (kernels, reference)
    launched = False

    def implementation(first, *others):
        nonlocal launched
        if first.dtype == torch.float64 or first.numel() == 0 or backends()['cuda'].implementation != 'triton':
            return REFERENCES[name](first, *others)
        SHAPES[name].check_again((first, *others))
        # Triton launches on the current stream of the current device, which need not be that of the tensors.
        with torch.cuda.device_of(first):
            try:
                outputs = kernels(first, *others)
            except Exception as error:
                if launched or isinstance(error, compat.OutOfMemoryError) or torch.cuda.is_current_stream_capturing():
                    raise
                give_up('triton', f'the first launch of {name} failed: {type(error).__name__}: {error}')
                return REFERENCES[name](first, *others)
        launched = True
        return outputs

    LIBRARY.impl(name, implementation, 'CUDA')


def uniform_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns a map (N, H, W, K) or sequence (N, L, K) as a sequence whose last dimension is contiguous.

    Slices of a packed tensor stay views: the kernels take the stride between tokens.
    """
    if x.ndim == 4:
        x = x.flatten(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up. `triton.cdiv`, which kernels can call too, takes 20 times as long."""
    return -(-a // b)


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Launches a kernel as so many programs.

    a·b + c is contracted to one instruction, which Triton's versions do not agree on as the default: without it the
    kernels have up to a third more instructions, and results depend on the version.
    """
    kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)
