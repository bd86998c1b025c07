"""``make env`` stops at once, with one sentence, where it cannot succeed, and makes again only what has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(folder, *arguments):
    """Runs make in a copy of what the Makefile reads, where nothing is installed yet."""
    folder.mkdir()
    for name in ('Makefile', 'setup.py', 'pyproject.toml'):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / 'requirements', folder / 'requirements')
    result = subprocess.run(
        ['make', '-C', str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2, result.stdout
    assert not (folder / '.venv').exists()
    return result.stderr.splitlines()


@pytest.mark.parametrize('target', ['quickstart', 'env'])
def test_a_path_with_blanks_is_refused(target, tmp_path):
    (line,) = make(tmp_path / 'with blank', target)
    assert line.endswith(f'which make cannot handle: move the checkout, now in "{tmp_path}/with blank".  Stop.')


@pytest.mark.parametrize('version', [(3, 9), (3, 13), (3, 14)])
def test_a_python_that_mmcv_does_not_build_on_is_refused(version, tmp_path):
    python = tmp_path / 'python'
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"\n'
    )
    python.chmod(0o755)
    line, *_ = make(tmp_path / 'checkout', 'quickstart', f'PYTHON={python}')
    assert line == (
        'mmcv 2.1.0 builds on Python 3.10 to 3.12, found {}.{}: make quickstart PYTHON=python3.12'.format(*version)
    )


STAMPS = ('.torch', '.package', '.kernels', '.complete')
TORCH = '.venv/lib/python3.11/site-packages/torch/version.py'


@pytest.mark.parametrize(
    ('touched', 'made'),
    [
        (None, []),
        ('ops/csrc/vec.h', ['build_ext']),
        ('ops/mlp/cpu.cpp', ['build_ext']),
        ('ops/mlp/reference.py', []),
        ('setup.py', ['install --no-build-isolation --no-deps -e', 'build_ext']),
        ('requirements/test.txt', ['install_mmcv']),
        (TORCH, ['build_ext', 'install_mmcv']),  # an update of PyTorch
    ],
)
def test_only_what_has_changed_is_made_again(touched, made, tmp_path):
    for name in ('Makefile', 'setup.py', 'pyproject.toml', 'requirements', 'ops'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    (tmp_path / TORCH).parent.mkdir(parents=True)
    (tmp_path / TORCH).touch()
    for path in tmp_path.rglob('*'):
        os.utime(path, (1e9, 1e9))
    for stamp in STAMPS:
        (tmp_path / '.venv' / stamp).touch()
        os.utime(tmp_path / '.venv' / stamp, (1.1e9, 1.1e9))
    if touched:
        os.utime(tmp_path / touched, (1.2e9, 1.2e9))
    command = ['make', '-n', '-C', str(tmp_path), 'env']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = ('-m venv', 'install --no-build-isolation --no-deps -e', 'build_ext', 'install_mmcv')
    assert [part for part in parts if part in printed] == made
