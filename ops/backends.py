"""Which implementation of the ops serves which device, and why a better one does not."""

import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

REQUIRE_VARIABLE = 'MMSPATIALMAMBA_REQUIRE'
COMPILED = {'cpp': 'cpu', 'triton': 'cuda'}
"""Compiled implementations and the device type that each serves."""
TRITON_OPS = (
    'depthwise_conv',
    'fusion_taps',
    'gated_norm',
    'layer_norm',
    'scan_states',
    'state_fusion',
    'structure_aware_ssm',
)
"""Ops whose folder has Triton kernels, which register themselves when they are imported."""


@dataclass(frozen=True)
class Backend:
    """What serves a device.

    Attributes:
        device: Device type, such as 'cpu'.
        implementation: 'cpp', 'triton' or 'reference' (plain PyTorch, slow).
        reason: Why the compiled implementation does not serve this device; empty if it does.
    """

    device: str
    implementation: str
    reason: str = ''


def backends() -> dict[str, Backend]:
    """Returns what serves each device type; devices that are not listed are served by the reference."""
    return dict(_loaded)


def load_backends() -> None:
    """Registers every compiled implementation that this machine can use.

    Raises:
        RuntimeError: An implementation named in the environment variable ``MMSPATIALMAMBA_REQUIRE`` (comma-separated)
            is unknown or cannot be used.
    """
    reasons = {'cpp': _load_cpp(), 'triton': _load_triton()}
    required = [name.strip() for name in os.environ.get(REQUIRE_VARIABLE, '').split(',') if name.strip()]
    for name in required:
        if name not in COMPILED:
            raise RuntimeError(f'{REQUIRE_VARIABLE}: expected names among {", ".join(COMPILED)}, got {name!r}')
        if reasons[name]:
            raise RuntimeError(f'{REQUIRE_VARIABLE} names {name!r}, which cannot be used: {reasons[name]}')
    for name, device in COMPILED.items():
        _loaded[device] = Backend(device, 'reference' if reasons[name] else name, reasons[name])


_loaded: dict[str, Backend] = {}


def _load_cpp() -> str:
    """Loads the C++ kernels built for the widest vector registers of this CPU; returns why not, or ''."""
    variants = ('avx512', 'avx2', 'default')
    capability = torch.backends.cpu.get_cpu_capability().lower()
    usable = variants[variants.index(capability) :] if capability in variants else ('default',)
    built = {variant: next(Path(__file__).parent.glob(f'_cpu_{variant}.*'), None) for variant in usable}
    library = next((built[variant] for variant in usable if built[variant]), None)
    if library is None:
        return f'not built for {" or ".join(usable)}: reinstall with a C++ compiler and MMSPATIALMAMBA_BUILD_OPS=1'
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = f'{library.name} does not load with PyTorch {torch.__version__}, reinstall mmspatialmamba: {error}'
        warnings.warn(f'mmspatialmamba: the slow reference serves the CPU: {reason}', stacklevel=2)
        return reason
    return ''


def _load_triton() -> str:
    """Registers the Triton kernels for CUDA devices; returns why not, or ''."""
    try:
        import triton
    except ImportError as error:
        return f'Triton cannot be imported: {error}'
    # Older versions are untested, and the first ones lack tuples of tensors and compile-time functions.
    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 6):
        return f'needs Triton 3.6 or later, found {triton.__version__}'
    for op in TRITON_OPS:
        importlib.import_module(f'.{op}.triton_kernels', __package__)
    return ''
