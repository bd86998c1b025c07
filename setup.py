"""Packaging of mmspatialmamba; the folder ``ops`` is the source of the package ``mmspatialmamba.ops``."""

import os
import platform
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REPOSITORY = os.environ.get('MMSPATIALMAMBA_REPOSITORY')
"""Address of the repository, which the release workflow knows: of the links and pictures in the wheel's README."""
VERSION = (ROOT / 'mmspatialmamba' / 'version.py').read_text().split("__version__ = '")[1].split("'")[0]
KERNELS = (ROOT / 'ops' / 'backends.py').read_text().split('KERNELS = ')[1].split('\n')[0]


def requirements(name: str) -> list[str]:
    """Returns the lines of ``requirements/<name>.txt`` without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


class BuildPy(build_py):
    """Adds what mim and config_path() look for in an installed package.

    The checkout has symbolic links there, of which Git for Windows and some zip programs make text files; so the
    folders themselves are copied.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmspatialmamba' / '.mim'
        for folder in ('configs', 'tools'):
            shutil.copytree(
                ROOT / folder, target / folder, ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True
            )
        shutil.copy2(ROOT / 'model-index.yml', target)


COMMANDS = {'build_py': BuildPy}
PACKAGES = [
    '.'.join((*parent, *path.parent.relative_to(ROOT).parts))
    for folder, parent in (('mmspatialmamba', ()), ('ops', ('mmspatialmamba',)))
    for path in sorted((ROOT / folder).rglob('__init__.py'))
]

BUILD_OPS = os.environ.get('MMSPATIALMAMBA_BUILD_OPS', 'auto')
if BUILD_OPS not in ('auto', '0', '1'):
    raise ValueError(f"MMSPATIALMAMBA_BUILD_OPS: expected 'auto', '0' or '1', got {BUILD_OPS!r}")

# Every variant takes three times as long to compile as that of this processor, and serves other machines alone.
CPU_VARIANTS = os.environ.get('MMSPATIALMAMBA_CPU_VARIANTS', 'native')
if CPU_VARIANTS not in ('native', 'all'):
    raise ValueError(f"MMSPATIALMAMBA_CPU_VARIANTS: expected 'native' or 'all', got {CPU_VARIANTS!r}")

# One library for each width of vector registers; ops/backends.py loads the widest that the CPU has.
VECTOR_FLAGS = {'default': []}
if platform.machine() in ('x86_64', 'AMD64'):
    MSVC = platform.system() == 'Windows'
    VECTOR_FLAGS['avx2'] = ['/arch:AVX2'] if MSVC else ['-mavx2', '-mfma', '-mf16c']
    VECTOR_FLAGS['avx512'] = (
        ['/arch:AVX512'] if MSVC else ['-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mfma', '-mf16c']
    )
COMPILE_FLAGS, LINK_FLAGS = {
    'Windows': (['/O2', '/openmp'], []),
    'Darwin': (['-O3', '-g0'], []),  # Apple's clang has no OpenMP
}.get(platform.system(), (['-O3', '-g0', '-fopenmp'], ['-fopenmp']))


def readme() -> str:
    """Returns README.md; with a known repository, its links and pictures by address, since a wheel has no docs/."""
    text = (ROOT / 'README.md').read_text()
    if not REPOSITORY:
        return text
    text = re.sub(r'(!\[[^\]]*\])\((?!https?:)', rf'\1({REPOSITORY}/raw/v{VERSION}/', text)
    return re.sub(r'(?<!!)(\[[^\]]*\])\((?!https?:|#)', rf'\1({REPOSITORY}/blob/v{VERSION}/', text)


def build_ops() -> dict:
    """Returns setup()'s arguments that build the C++ kernels, or none where they are not to be built or cannot be."""
    if BUILD_OPS == '0':
        return skipped('MMSPATIALMAMBA_BUILD_OPS=0')
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return skipped(f'{error} (pip needs --no-build-isolation to see the installed PyTorch)', error)

    class BuildOps(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                skipped(f'they do not compile: {error}', error)
                self.extensions.clear()

        def build_extension(self, ext):
            # The variants compile the same sources: without folders of their own each would overwrite the last.
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            super().build_extension(ext)
            self.build_temp = shared

    minor = '.'.join(torch.__version__.split('.')[:2])

    def extension(variant: str) -> CppExtension:
        capability = variant.upper()
        macros = [f'-DCPU_CAPABILITY={capability}', f'-DCPU_CAPABILITY_{capability}']
        return CppExtension(
            f'mmspatialmamba.ops._cpu_{variant}_v{KERNELS}_torch{minor.replace(".", "_")}',
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'ops').glob('*/cpu.cpp')),
            extra_compile_args=[*COMPILE_FLAGS, *macros, *VECTOR_FLAGS[variant]],
            extra_link_args=LINK_FLAGS,
            py_limited_api=True,  # the libraries hold no symbol of Python
        )

    native = torch.backends.cpu.get_cpu_capability().lower()
    variants = list(VECTOR_FLAGS) if CPU_VARIANTS == 'all' else [native if native in VECTOR_FLAGS else 'default']
    COMMANDS['build_ext'] = BuildOps
    built = {
        'ext_modules': [extension(variant) for variant in variants],
        'options': {'bdist_wheel': {'py_limited_api': 'cp310'}},
    }
    if BUILD_OPS == '1':  # Kernels that somebody asked for bind the installation to the PyTorch they are built for.
        built |= {'version': f'{VERSION}+torch{minor}', 'install_requires': [f'torch=={minor}.*']}
    return built


def skipped(reason: str, error: Exception | None = None) -> dict:
    """Says that the C++ kernels are left out; raises instead if they were asked for."""
    if BUILD_OPS == '1':
        raise RuntimeError(f'MMSPATIALMAMBA_BUILD_OPS=1, but the C++ kernels cannot be built: {reason}') from error
    print(f'mmspatialmamba: C++ kernels skipped, the ops run in plain PyTorch on CPUs, 6 to 25 times slower: {reason}')
    return {}


ARGUMENTS = {'version': VERSION, 'install_requires': ['torch>=2.1']} | build_ops()
LINKS = {
    'Paper': 'https://arxiv.org/abs/2410.15091',
    'Original code': 'https://github.com/EdwardChasel/Spatial-Mamba',
    'VMamba': 'https://github.com/MzeroMiko/VMamba',
} | ({'Repository': REPOSITORY, 'Changelog': f'{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md'} if REPOSITORY else {})

setup(
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',  # as a text, which every version of setuptools takes here
    project_urls=LINKS,
    packages=PACKAGES,
    package_dir={'mmspatialmamba.ops': 'ops'},
    package_data={'mmspatialmamba': ['py.typed']},
    # The OpenMMLab distributions are extras, never requirements: their maintained forks (onedl-*) own the same modules,
    # and pip would write over them.
    extras_require={name: requirements(name) for name in ('openmmlab', 'onedl', 'mim', 'export', 'weights', 'test')},
    cmdclass=COMMANDS,
    **ARGUMENTS,
)
