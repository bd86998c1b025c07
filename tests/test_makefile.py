"""``make env`` stops at once, with one sentence, where it cannot succeed."""

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
