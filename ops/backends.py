"""Which implementation of the ops serves which device, and why a better one does not."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

REQUIRE_VARIABLE = 'MMSPATIALMAMBA_REQUIRE'
KERNELS = 4
"""Version of the C++ kernels, a part of their libraries' names; setup.py reads it here.

It rises with the schema of an op: to load a library that was built for another schema would end the process.
"""
BUILT_FOR = 'torch' + '_'.join(torch.__version__.split('.')[:2])
"""The PyTorch that the C++ kernels have to be built for, the end of their libraries' names as setup.py writes them.

PyTorch keeps its C++ interface within a minor version only; a library of another one may load, and go wrong later.
"""
COMPILED = {'cpp': 'cpu', 'triton': 'cuda'}
"""Compiled implementations and the device type that each serves."""
TRITON_OPS = (
    'depthwise_conv',
    'fusion_taps',
    'gated_norm',
    'layer_norm',
    'scan_states',
    'selective_scan',
    'state_fusion',
    'structure_aware_ssm',
)
"""Ops whose folder has Triton kernels, which register themselves when they are imported."""
BUILD = 'MMSPATIALMAMBA_BUILD_OPS=1 pip install --no-build-isolation --no-deps -e .'
"""Builds the C++ kernels in a checkout, or shows why they do not build, which pip hides otherwise."""


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


def library_name(variant: str) -> str:
    """Returns the name, without its ending, of the library of the C++ kernels for a width of vector registers."""
    return f'_cpu_{variant}_v{KERNELS}_{BUILT_FOR}'


def load_backends() -> None:
    """Registers every compiled implementation that this machine can use.

    Raises:
        RuntimeError: An implementation named in the environment variable ``MMSPATIALMAMBA_REQUIRE`` (comma-separated)
            is unknown or cannot be used.
    """
    reasons = {'cpp': _load_cpp(), 'triton': _load_triton()}
    for name in _required():
        if name not in COMPILED:
            raise RuntimeError(f'{REQUIRE_VARIABLE}: expected names among {", ".join(COMPILED)}, got {name!r}')
        if reasons[name]:
            raise RuntimeError(f'{REQUIRE_VARIABLE} names {name!r}, which cannot be used: {reasons[name]}')
    for name, device in COMPILED.items():
        _loaded[device] = Backend(device, 'reference' if reasons[name] else name, reasons[name])


def give_up(name: str, reason: str) -> None:
    """Leaves the device type of a registered implementation to the reference from now on, which warns with the reason.

    Raises:
        RuntimeError: The environment variable ``MMSPATIALMAMBA_REQUIRE`` names it.
    """
    if name in _required():
        raise RuntimeError(f'{REQUIRE_VARIABLE} names {name!r}, which cannot be used: {reason}')
    _loaded[COMPILED[name]] = Backend(COMPILED[name], 'reference', reason)


_loaded: dict[str, Backend] = {}


def _required() -> list[str]:
    """Returns the names in the environment variable ``MMSPATIALMAMBA_REQUIRE``."""
    return [name.strip() for name in os.environ.get(REQUIRE_VARIABLE, '').split(',') if name.strip()]


def _load_cpp() -> str:
    """Loads the C++ kernels built for the widest vector registers of this CPU; returns why not, or ''."""
    variants = ('avx512', 'avx2', 'default')
    capability = torch.backends.cpu.get_cpu_capability().lower()
    usable = variants[variants.index(capability) :] if capability in variants else ('default',)
    folder = Path(__file__).parent
    libraries = [path for variant in usable for path in folder.glob(f'{library_name(variant)}.*')]
    if not libraries:
        others = sorted(path.name.partition('.')[0] for path in folder.glob('_cpu_*'))
        found = f'; there are {", ".join(others)}' if others else ''
        wanted = ' or '.join(map(library_name, usable))
        return (
            f'{wanted} is not built for PyTorch {torch.__version__}{found}. In a checkout, with a C++ compiler: {BUILD}'
        )
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f'{libraries[0].name} does not load with PyTorch {torch.__version__} ({error}). In a checkout: {BUILD}'
    return ''


def _load_triton() -> str:
    """Registers the Triton kernels for CUDA devices; returns why not, or ''."""
    try:
        import triton
    except ImportError as error:
        return f'Triton cannot be imported ({error}): pip install "triton>=3.4"'
    # Older versions lack tuples of tensors, or cannot index a tuple of constants.
    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 4):
        return f'needs Triton 3.4 or later, found {triton.__version__}: pip install "triton>=3.4"'
    for op in TRITON_OPS:
        importlib.import_module(f'.{op}.triton_kernels', __package__)
    return ''
