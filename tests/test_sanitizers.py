"""The C++ kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, through their own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmspatialmamba.ops.backends import library_name
from torch.utils import cpp_extension

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
VARIANTS = {'default': [], 'avx2': ['-mavx2', '-mfma', '-mf16c']}
CASES = 'parity and not variant or layouts or empty or stay'


def runtime(name):
    """Path of a sanitizer's runtime library, as the compiler knows it."""
    path = subprocess.run(
        ['c++', f'-print-file-name={name}'], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(path).is_absolute(), f'the compiler has no {name}'
    return path


def run(folder, environment, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def usable(variant):
    return variant == 'default' or torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')


@pytest.mark.parametrize('variant', VARIANTS)
def test_kernels_under_sanitizers(variant, tmp_path):
    """Reads and writes outside of tensors, shifts, overflows and misaligned accesses end the process."""
    if not usable(variant):
        pytest.skip(f'this CPU has no {variant}')
    package = tmp_path / 'mmspatialmamba'
    shutil.copytree(ROOT / 'mmspatialmamba', package, ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    shutil.copytree(ROOT / 'ops', package / 'ops', ignore=shutil.ignore_patterns('*.so', '*.cpp', '*.h', '__pycache__'))
    capability = variant.upper()
    command = [
        'c++', '-shared', '-fPIC', '-std=c++20', '-O1', '-g1', '-fopenmp',
        '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-fno-sanitize=vptr,null,object-size',
        f'-DCPU_CAPABILITY={capability}', f'-DCPU_CAPABILITY_{capability}', *VARIANTS[variant],
        *(f'-I{path}' for path in cpp_extension.include_paths('cpu')),
        *sorted((ROOT / 'ops').glob('*/cpu.cpp')),
        *(f'-L{path}' for path in cpp_extension.library_paths('cpu')), '-ltorch', '-ltorch_cpu', '-lc10',
        '-o', package / 'ops' / f'{library_name(variant)}.so',
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]

    environment = {
        **os.environ,
        'PYTHONPATH': str(tmp_path),
        'ATEN_CPU_CAPABILITY': variant,
        'MMSPATIALMAMBA_REQUIRE': 'cpp',
        'LD_PRELOAD': f'{runtime("libasan.so")} {runtime("libubsan.so")}',
        'ASAN_OPTIONS': 'detect_leaks=0',  # Python itself never frees some of its memory
        'OMP_NUM_THREADS': '2',
    }
    check = 'import mmspatialmamba.ops as ops; print(ops.__file__, ops.backends()["cpu"].implementation)'
    loaded = run(tmp_path, environment, '-c', check)
    assert loaded.stdout.split() == [str(package / 'ops' / '__init__.py'), 'cpp'], loaded.stderr[-4000:]
    unprotected = run(tmp_path, {**environment, 'LD_PRELOAD': ''}, '-c', check)
    assert 'ASan runtime does not come first' in unprotected.stderr  # so the kernels are those with checks

    cases = (ROOT / 'tests' / 'test_ops_cpp.py', '-k', CASES)
    done = run(tmp_path, environment, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *cases)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert 'skipped' not in done.stdout
