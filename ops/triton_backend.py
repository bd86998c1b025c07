"""What the Triton implementations of all ops share: their registration for CUDA devices and the layout they take."""

from collections.abc import Callable

import torch

from .library import LIBRARY, check_call

IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {}
"""For each registered op, what computes it with Triton kernels and with plain PyTorch."""


def register(name: str, kernels: Callable, reference: Callable) -> None:
    """Registers an op's Triton implementation for CUDA devices.

    The reference serves what the kernels do not: float64, as they accumulate in float32 (gradcheck needs it, no user
    trains in it), and an empty batch, as a grid of no programs cannot be launched.
    """
    IMPLEMENTATIONS[name] = (kernels, reference)

    def implementation(first, *others):
        check_call(name, first, *others)
        if first.dtype == torch.float64 or first.numel() == 0:
            return reference(first, *others)
        # Triton launches on the current stream of the current device, which need not be that of the tensors.
        with torch.cuda.device_of(first):
            return kernels(first, *others)

    LIBRARY.impl(name, implementation, 'CUDA')


def uniform_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns a map (N, H, W, K) or sequence (N, L, K) as a sequence whose last dimension is contiguous.

    Slices of a packed tensor stay views: the kernels take the stride between tokens.
    """
    if x.ndim == 4:
        x = x.flatten(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Launches a kernel as so many programs.

    a·b + c is contracted to one instruction, which Triton's versions do not agree on as the default: without it the
    kernels have up to a third more instructions, and results depend on the version.
    """
    kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)
