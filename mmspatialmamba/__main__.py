"""The environment doctor: ``python -m mmspatialmamba`` prints what is installed, what serves the ops, and advice."""

import importlib
import importlib.metadata
import platform
import sys

import torch

from . import install_mmcv, ops
from .version import __version__

TOOLBOXES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mim')
OTHERS = ('torchvision', 'triton', 'numpy')


def main() -> int:
    """Prints the report; returns 1 if there is advice that concerns a broken installation, else 0."""
    print(f'mmspatialmamba {__version__}, Python {platform.python_version()}, {platform.platform()}')
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}')
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f'GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}')
    else:
        print('GPU: none')
    advice = [line for name in TOOLBOXES + OTHERS if (line := report_module(name))]
    broken = bool(advice)
    if sys.modules.get('mmengine') is None:  # the package itself tries to import it
        advice.append('without mmengine there are the ops alone; for the backbones install an OpenMMLab stack (README)')
    for backend in ops.backends().values():
        print(f'ops on {backend.device}: {backend.implementation}')
        if backend.reason and (backend.device == 'cpu' or torch.cuda.is_available()):
            advice.append(f'ops on {backend.device} are slow: {backend.reason}')
    for line in advice:
        print(f'advice: {line}')
    return int(broken)


def report_module(name: str) -> str:
    """Prints which distribution provides a module; returns a line of advice if the module is unusable, or ''."""
    providers = importlib.metadata.packages_distributions().get(name, [])
    if not providers:
        print(f'{name}: not installed')
        return ''
    versions = ', '.join(f'{provider} {importlib.metadata.version(provider)}' for provider in sorted(set(providers)))
    if name == 'mim':
        print(f'{name}: {versions}')
        return ''
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f'{name}: {versions}, cannot be imported')
        return f'{name} cannot be imported ({type(error).__name__}: {error}); install versions that fit each other'
    if len(set(providers)) > 1:
        print(f'{name}: {versions}')
        return f'{name} comes from several distributions, which write over each other; keep one of {versions}'
    if name == 'mmcv':
        return report_mmcv(providers, versions)
    print(f'{name}: {versions}')
    return ''


def report_mmcv(providers: list[str], versions: str) -> str:
    """Prints which ops mmcv has, and for which GPUs; returns the advice that gives it those that this machine needs."""
    on_gpu = torch.cuda.is_available() and torch.version.cuda is not None
    fault = install_mmcv.find_fault(install_mmcv.cards() if on_gpu else [])
    library = install_mmcv.library()
    code = install_mmcv.gpu_code(library) if library else []
    kinds = f', CUDA ops for {install_mmcv.describe(code)}' if code else ''
    if not install_mmcv.compiled_for():
        kinds += f', which load. {install_mmcv.UNKNOWN}'
    print(f'mmcv: {versions}, ' + ('not with the ops that this machine needs' if fault else f'with its ops{kinds}'))
    return f'{fault}; detectors need them: {repair(providers)}' if fault else ''


def repair(providers: list[str]) -> str:
    """Returns the command that gives the installed mmcv ops that fit this PyTorch and this machine."""
    name = providers[0].lower().replace('_', '-')
    if name == 'mmcv-lite':  # it has no ops by intent
        return f'pip uninstall mmcv-lite && {install_mmcv.COMMAND}'
    requirement = f'{name}=={install_mmcv.installed_version(name)}'
    return install_mmcv.COMMAND if requirement == install_mmcv.REQUIREMENT else f'{install_mmcv.COMMAND} {requirement}'


if __name__ == '__main__':
    sys.exit(main())
