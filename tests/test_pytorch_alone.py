"""What an environment with PyTorch alone can do: the ops, the doctor, an exported program; and what it is told."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import textwrap
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import mmspatialmamba
from mmspatialmamba import SpatialMamba

PACKAGE = Path(mmspatialmamba.__file__).parent
OPS = Path(mmspatialmamba.ops.__file__).parent
BENCHMARK = Path(__file__).parents[1] / 'tools' / 'benchmark.py'


def required(name, found=()):
    """Returns a distribution and those that it requires, themselves included."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # CUDA libraries of another build
        return found
    if distribution.name in found:
        return found
    found = (*found, distribution.name)
    for requirement in map(Requirement, distribution.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
            found = required(requirement.name, found)
    return found


@pytest.fixture(scope='module')
def python(tmp_path_factory):
    """Interpreter of an environment whose packages are links to PyTorch, what it requires, and this package."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob('lib/python*/site-packages')
    for name in required('torch'):
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files} - {'..', '__pycache__'}:
            (packages / top).symlink_to(distribution.locate_file(top))
    own = packages / 'mmspatialmamba'
    own.mkdir()
    for path in PACKAGE.iterdir():
        (own / path.name).symlink_to(path)
    if not (own / 'ops').exists():  # in a checkout it lies elsewhere
        (own / 'ops').symlink_to(OPS)
    return folder / 'bin' / 'python'


def run(python, *args, folder=None):
    """Runs the interpreter, ``folder`` first on its path, and returns the finished process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'MMSPATIAL'))}
    if folder:
        environment['PYTHONPATH'] = str(folder)
    command = [str(python), *map(str, args)]
    # Not in the checkout, which Python would find before the packages of the environment.
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=Path(python).parent
    )


def run_code(python, code, folder=None):
    """Returns the last line that the code prints."""
    result = run(python, '-c', textwrap.dedent(code), folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_ops(python):
    code = """
        import importlib.util
        import torch
        import mmspatialmamba.ops as ops
        u = torch.ones(1, 2, 3)
        h = ops.scan_states(u, u, -torch.ones(3), torch.ones(1, 2, 1))
        others = [name for name in ('mmengine', 'mmcv', 'mmdet', 'numpy') if importlib.util.find_spec(name)]
        print(others, ops.backends()['cpu'].implementation, tuple(h.shape))
    """
    assert run_code(python, code) == f'[] {mmspatialmamba.ops.backends()["cpu"].implementation} (1, 2, 3)'


def test_doctor_says_what_is_missing(python):
    result = run(python, '-m', 'mmspatialmamba')
    assert result.returncode == 0, result.stderr
    for line in ('^torch ', '^mmengine: not installed$', '^mmcv: not installed$', '^ops on cpu: '):
        assert re.search(line, result.stdout, re.MULTILINE)
    assert 'advice: without mmengine there are the ops alone' in result.stdout


def test_an_exported_program_runs(python, tmp_path):
    model = SpatialMamba({'embed_dims': 8, 'depths': (1, 1, 1, 1)}).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (image,)), tmp_path / 'model.pt2')
        torch.save((image, model(image)), tmp_path / 'maps.pt')
    code = f"""
        import torch, mmspatialmamba.ops
        image, expected = torch.load({str(tmp_path / 'maps.pt')!r})
        maps = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()(image)
        torch.testing.assert_close(maps, expected)
        print(len(maps))
    """
    assert run_code(python, code) == '4'


def test_benchmark_of_the_ops(python, tmp_path):
    result = run(python, BENCHMARK, 'ops', '--shapes', 't1_32x32', '--rounds', '1', '--out', tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'structure_aware_ssm' in result.stdout


def test_what_needs_mmengine_says_so(python):
    assert all(hasattr(mmspatialmamba, name) for name in mmspatialmamba.WITH_MMENGINE)
    code = """
        import mmspatialmamba
        said = []
        for name in mmspatialmamba.WITH_MMENGINE:
            try:
                getattr(mmspatialmamba, name)
            except ModuleNotFoundError as error:
                said.append(str(error).startswith(f'mmspatialmamba.{name} needs MMEngine, which is not installed'))
        print(said, hasattr(mmspatialmamba, 'something_else'))
    """
    assert run_code(python, code) == f'{[True] * len(mmspatialmamba.WITH_MMENGINE)} False'


BROKEN = {
    'raises': ("raise ImportError('libGL.so.1 is missing')", 'ImportError: libGL.so.1 is missing'),
    'lacks a package': ('import yaml', "ModuleNotFoundError: No module named 'yaml'"),
    'lacks a part': ('import mmengine.config', "ModuleNotFoundError: No module named 'mmengine.config'"),
}


@pytest.mark.parametrize('how', BROKEN)
def test_a_broken_mmengine_is_not_taken_for_a_missing_one(python, tmp_path, how):
    content, message = BROKEN[how]
    (tmp_path / 'mmengine').mkdir()
    (tmp_path / 'mmengine' / '__init__.py').write_text(content)
    result = run(python, '-c', 'import mmspatialmamba', folder=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
