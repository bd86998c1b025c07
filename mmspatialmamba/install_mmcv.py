"""Installs mmcv with its ops, compiled for the PyTorch at hand: ``python -m mmspatialmamba.install_mmcv``.

mmcv has ready wheels for a few versions of PyTorch only, and pip keeps what it compiled by name and Python alone: it
hands a wheel of another PyTorch out again. So the wheel is kept here by all that it depends on, it says itself what it
was compiled for, and its ops are loaded after the installation. On a machine with an NVIDIA GPU the CUDA ops are
compiled too, for the card at hand, with the toolkit of the machine or with nvcc from PyPI.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REQUIREMENT = 'mmcv==2.1.0'
"""What is installed unless told otherwise; mmdet 3.3.0 and mmsegmentation 1.2.2 refuse a newer one."""
COMMAND = 'python -m mmspatialmamba.install_mmcv'
BUILD_TOOLS = ('setuptools<82', 'wheel', 'ninja', 'psutil')
"""What mmcv's setup.py imports; setuptools 82 dropped pkg_resources."""
NVCC = ('nvidia-cuda-nvcc', 'nvidia-nvvm', 'nvidia-cuda-crt', 'nvidia-cuda-cccl')
"""Packages on PyPI that make a compiler beside the CUDA libraries that PyTorch brings, from CUDA 13 on.

Those of CUDA 12 (``nvidia-cuda-nvcc-cu12``) have ptxas but no nvcc.
"""
STAMP = 'compiled_for.txt'
"""File in the installed package ``mmcv`` that names the PyTorch it was compiled for."""
UNKNOWN = 'Nothing says for which PyTorch they were compiled'
"""What is said of ops that load, in an mmcv without `STAMP`: a ready wheel, or one that pip compiled by itself."""
FATBIN = 0xBA55ED50
"""Begins the code for GPUs in a library."""


def main(arguments: list[str] | None = None) -> int:
    """Installs mmcv unless what is installed fits already; returns 0, or ends the process with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition(':')[0], prog=COMMAND)
    parser.add_argument('requirement', nargs='?', default=REQUIREMENT, help=f'NAME==VERSION (default {REQUIREMENT})')
    parser.add_argument('--without-cuda', action='store_true', help='leave the CUDA ops out, although there is a GPU')
    args = parser.parse_args(arguments)
    name, separator, version = args.requirement.partition('==')
    if not (name and separator and version):
        parser.error(f'expected NAME==VERSION, got {args.requirement!r}')

    refuse_other_distributions(name)
    architectures = [] if args.without_cuda else cuda_architectures()
    if installed_version(name) == version and not find_fault(architectures):
        fit = f'fit {target(architectures)}'
        unknown = f'load. {UNKNOWN}; to be sure, pip uninstall {name} and run this again'
        print(f'{args.requirement} is installed, and its ops {fit if compiled_for() else unknown}')
        return 0
    try:
        wheel = cached_wheel(args.requirement, architectures) or compile_wheel(args.requirement, architectures)
        pip('install', '--force-reinstall', '--no-deps', wheel)
        pip('install', wheel)  # what it requires
    except subprocess.CalledProcessError as error:
        raise SystemExit(f'{args.requirement}: its output says why this failed: {shlex.join(error.cmd)}') from None
    if fault := find_fault(architectures):
        raise SystemExit(f'{args.requirement} is installed, but {fault}')
    print(f'{args.requirement} is installed; its ops were compiled for {target(architectures)}, and load')
    return 0


def refuse_other_distributions(name: str) -> None:
    """Ends the process where another distribution owns the module ``mmcv``, over which pip would write."""
    importlib.invalidate_caches()
    owners = importlib.metadata.packages_distributions().get('mmcv', [])
    others = {owner.lower().replace('_', '-') for owner in owners} - {name}
    if others:
        raise SystemExit(f'the module mmcv belongs to {", ".join(sorted(others))}: pip uninstall it before {name}')


def cuda_architectures() -> list[str]:
    """Returns what CUDA ops are needed for, such as ['8.6', '9.0']: the cards at hand, or what the environment names.

    ``FORCE_CUDA=1`` with ``TORCH_CUDA_ARCH_LIST`` asks for them where there is no GPU.

    Returns:
        Compute capabilities; none for a PyTorch without CUDA, or where there is neither a GPU nor ``FORCE_CUDA=1``.
    """
    forced = os.environ.get('FORCE_CUDA') == '1'
    if not (torch.cuda.is_available() or forced):
        return []
    if torch.version.cuda is None:
        if forced:
            raise SystemExit(f'FORCE_CUDA=1, but PyTorch {torch.__version__} is a build without CUDA')
        return []
    if named := os.environ.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split():
        for name in named:
            if not re.fullmatch(r'\d+\.\d[af]?(\+PTX)?', name):
                raise SystemExit(f'TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.6, got {name!r}')
        return named
    if not torch.cuda.is_available():
        raise SystemExit('FORCE_CUDA=1 without a GPU: name its compute capability, such as TORCH_CUDA_ARCH_LIST=8.6')
    return cards()


def cards() -> list[str]:
    """Returns the compute capabilities of this machine's GPUs, such as ['8.6']."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f'{major}.{minor}' for major, minor in sorted(found)]


def target(architectures: list[str]) -> str:
    """Names all that mmcv's compiled ops depend on, the architectures aside, for people and for `STAMP`."""
    cuda = f', CUDA {torch.version.cuda}, GPUs of {" ".join(architectures)}' if architectures else ''
    return f'PyTorch {torch.__version__}, {sys.implementation.cache_tag}, {platform.machine()}{cuda}'


def find_fault(architectures: list[str]) -> str:
    """Returns what is wrong with the installed mmcv, as the end of a sentence, or '' if its ops can be used.

    Args:
        architectures: Compute capabilities for which CUDA ops are needed.
    """
    importlib.invalidate_caches()
    if importlib.util.find_spec('mmcv') is None:
        return 'mmcv is not installed'
    built, here = compiled_for().split(', '), target([]).split(', ')
    if built[0] and built[: len(here)] != here:
        return f"mmcv's ops were compiled for {', '.join(built[: len(here)])}, this is {', '.join(here)}"
    # In another process: a library that is loaded stays, whatever is installed afterwards.
    loaded = subprocess.run([sys.executable, '-c', 'import mmcv.ops'], capture_output=True, text=True, check=False)
    if loaded.returncode:
        return f"mmcv's ops do not load ({(loaded.stderr.strip() or 'the process ended').splitlines()[-1]})"
    if architectures:
        served = gpu_code(library())
        missing = [card for card in architectures if not any(runs_on(card, *code) for code in served)]
        if not served:
            return 'mmcv has no CUDA ops'
        if missing:
            return f"mmcv's CUDA ops are for {describe(served)}, not for GPUs of {' '.join(missing)}"
    return ''


def compiled_for() -> str:
    """Returns what the installed mmcv's ops were compiled for, or '' if nothing says it."""
    stamp = Path(importlib.util.find_spec('mmcv').origin).with_name(STAMP)
    return stamp.read_text() if stamp.is_file() else ''


def installed_version(name: str) -> str:
    """Returns the installed version of a distribution without its local label, or ''."""
    try:
        return importlib.metadata.version(name).partition('+')[0]
    except importlib.metadata.PackageNotFoundError:
        return ''


def library() -> Path | None:
    """Returns the path of the installed mmcv's compiled library, if there is one."""
    return next(Path(importlib.util.find_spec('mmcv').origin).parent.glob('_ext.*'), None)


def gpu_code(path: Path) -> list[tuple[str, int]]:
    """Returns the kinds of GPU code in a library: ('sm', 90) is machine code, ('compute', 90) is compiled at its start.

    Source: the headers that nvcc 13.0 writes; each piece of code states its kind, its length and its architecture.
    """
    content = path.read_bytes()
    found = set()
    start = content.find(struct.pack('<I', FATBIN))
    while start >= 0:
        header, length = struct.unpack_from('<HQ', content, start + 6)
        position = start + header
        end = position + length
        while position < end:
            kind, _, header, length = struct.unpack_from('<HHIQ', content, position)
            (architecture,) = struct.unpack_from('<I', content, position + 28)
            found.add(('compute' if kind == 1 else 'sm', architecture))
            position += header + length
        start = content.find(struct.pack('<I', FATBIN), end)
    return sorted(found)


def runs_on(card: str, kind: str, architecture: int) -> bool:
    """Whether GPU code runs on a card of a compute capability such as '8.6' ('9.0a' and '9.0+PTX' count as 9.0)."""
    major, _, minor = card.partition('+')[0].rstrip('af').partition('.')
    capability = 10 * int(major) + int(minor)
    same = architecture // 10 == capability // 10
    return architecture <= capability and (kind == 'compute' or same)


def describe(code: list[tuple[str, int]]) -> str:
    """Returns kinds of GPU code as nvcc writes them, such as 'sm_80, sm_90'."""
    return ', '.join(f'{kind}_{architecture}' for kind, architecture in code)


def cache_folder(requirement: str, architectures: list[str]) -> Path:
    """Returns the folder of the one wheel that fits."""
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    key = target(architectures).replace(', ', '-').replace(' ', '-')
    return root / 'mmspatialmamba' / 'wheels' / requirement / key


def cached_wheel(requirement: str, architectures: list[str]) -> Path | None:
    """Returns the wheel that was compiled before for this PyTorch, CUDA, Python and these cards, if there is one."""
    return next(cache_folder(requirement, architectures).glob('*.whl'), None)


def compile_wheel(requirement: str, architectures: list[str]) -> Path:
    """Compiles a wheel, writes into it what it was compiled for, and keeps it; returns its path."""
    pip('install', *BUILD_TOOLS)
    environment = {'CFLAGS': '-g0 -O2', **os.environ, 'MMCV_WITH_OPS': '1'}
    if architectures:
        environment |= {
            'CUDA_HOME': str(find_cuda_home()),
            'FORCE_CUDA': '1',
            'TORCH_CUDA_ARCH_LIST': ';'.join(architectures),
        }
    else:
        environment |= {'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''}
    folder = cache_folder(requirement, architectures)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        print(f'{requirement}: compiling for {target(architectures)} (minutes; with CUDA up to an hour of one core)')
        name = requirement.partition('==')[0]
        options = ('--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', name)
        pip('wheel', *options, '--wheel-dir', temporary, requirement, environment=environment)
        (wheel,) = Path(temporary).glob('*.whl')
        run_module('wheel', 'unpack', '--dest', temporary, wheel)
        (unpacked,) = (path for path in Path(temporary).iterdir() if path.is_dir())
        (unpacked / 'mmcv' / STAMP).write_text(target(architectures))
        run_module('wheel', 'pack', '--dest-dir', temporary, unpacked)
        shutil.rmtree(unpacked)
        folder.mkdir(exist_ok=True)
        return wheel.replace(folder / wheel.name)


def find_cuda_home() -> Path:
    """Returns the folder of a CUDA toolkit that compiles for this PyTorch.

    Returns:
        The machine's own where PyTorch finds one of the same major version that can compile, else nvcc from PyPI.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    fault = toolkit_fault(Path(CUDA_HOME)) if CUDA_HOME else 'there is none'
    if not fault:
        print(f'CUDA toolkit: {CUDA_HOME}')
        return Path(CUDA_HOME)
    print(f'CUDA toolkit of this machine: {fault}; trying nvcc from PyPI')
    cuda = torch.version.cuda
    advice = (
        f'install the CUDA toolkit {cuda} (https://developer.nvidia.com/cuda-toolkit-archive), set CUDA_HOME to its '
        f'folder and run "{COMMAND}" again; or install a PyTorch that has a ready wheel of mmcv; or leave the CUDA ops '
        'out by --without-cuda: detectors then run on a CPU alone'
    )
    if int(cuda.partition('.')[0]) < 13:
        raise SystemExit(f'PyPI has no nvcc for CUDA {cuda}, only from CUDA 13 on: {advice}')
    try:
        pip('install', *(f'{package}=={cuda}.*' for package in NVCC))
    except subprocess.CalledProcessError:
        raise SystemExit(f'nvcc {cuda} cannot be installed from PyPI (pip says why above): {advice}') from None
    home = link_toolkit(Path(importlib.metadata.distribution(NVCC[0]).locate_file('nvidia')), cuda)
    if fault := toolkit_fault(home):
        raise SystemExit(f'nvcc from PyPI, in {home}: {fault}. So {advice}')
    print(f'CUDA toolkit: {home}')
    return home


def link_toolkit(packages: Path, cuda: str) -> Path:
    """Adds the names to NVIDIA's packages by which compilers look for libraries; returns the toolkit's folder.

    Args:
        packages: Folder ``nvidia`` of the installed packages.
        cuda: Version of CUDA, such as '13.0'.
    """
    major = cuda.partition('.')[0]
    home = packages / f'cu{major}'
    for link, name in (('lib64', 'lib'), ('lib/libcudart.so', f'libcudart.so.{major}')):
        if not (home / link).exists():
            (home / link).symlink_to(name)
    return home


def toolkit_fault(home: Path) -> str:
    """Returns why a CUDA toolkit cannot compile for this PyTorch, or ''."""
    nvcc = home / 'bin' / 'nvcc'
    for name in ('bin/nvcc', 'include/cuda_runtime.h', 'include/cublas_v2.h'):
        if not (home / name).is_file():
            return f'{home} has no {name}'
    version = subprocess.run([nvcc, '--version'], capture_output=True, text=True, check=False).stdout
    if f'release {torch.version.cuda.partition(".")[0]}.' not in version:
        found = version.partition('release ')[2].partition(',')[0] or 'unknown'
        return f'{nvcc} is of CUDA {found}, PyTorch {torch.__version__} of {torch.version.cuda}'
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'empty.cu'
        source.write_text('__global__ void empty() {}\n')
        command = [nvcc, '-c', source, '-o', source.with_suffix('.o')]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        return f'{nvcc} does not compile an empty kernel ({(compiled.stderr.strip() or "no message").splitlines()[-1]})'
    return ''


def pip(*arguments: object, environment: dict[str, str] | None = None) -> None:
    """Runs this Python's pip."""
    run_module('pip', *arguments, environment=environment)


def run_module(*command: object, environment: dict[str, str] | None = None) -> None:
    """Runs a module of this Python, its output on the terminal.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    subprocess.run([sys.executable, '-m', *map(str, command)], check=True, env=environment)


if __name__ == '__main__':
    sys.exit(main())
