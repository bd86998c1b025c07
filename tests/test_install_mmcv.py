"""mmcv's ops fit the PyTorch at hand, or the doctor says what helps; and the wheel is compiled for what is there."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

from mmspatialmamba import install_mmcv

ROOT = Path(__file__).parents[1]
FATBIN = Path(__file__).parent / 'data' / 'empty_kernel_sm80_sm90.o'
"""``__global__ void empty() {}`` by nvcc 13.0.88 for sm_80, sm_90 and compute_90."""


def fake_mmcv(folder, version='2.1.0', name='mmcv', library=b'', stamp=None):
    """An mmcv that is found before the environment's own, whose compiled library is ``library``."""
    (folder / 'mmcv').mkdir()
    (folder / 'mmcv' / '__init__.py').touch()
    (folder / 'mmcv' / 'ops.py').write_text('from . import _ext')
    (folder / 'mmcv' / f'_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}').write_bytes(library)
    if stamp:
        (folder / 'mmcv' / install_mmcv.STAMP).write_text(stamp)
    metadata = folder / f'{name.replace("-", "_")}-{version}.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    (metadata / 'top_level.txt').write_text('mmcv\n')


def doctor(folder, setup=''):
    """Runs the doctor with what lies in a folder in place of the environment's own mmcv."""
    code = f"""
import importlib.metadata, os, pathlib, sys
folder = {str(folder)!r}
sys.path.insert(0, folder)
os.environ['PYTHONPATH'] = folder
found = importlib.metadata.packages_distributions
own = [path.name.partition('-')[0].replace('_', '-') for path in pathlib.Path(folder).glob('*.dist-info')]
importlib.metadata.packages_distributions = lambda: found() | {{'mmcv': own}}
{setup}
import mmspatialmamba.__main__ as doctor
doctor.TOOLBOXES, doctor.OTHERS = ('mmcv',), ()  # the others take seconds to import
sys.exit(doctor.main())
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert not result.stderr, result.stderr
    return result


@pytest.mark.parametrize(
    ('name', 'version', 'command'),
    [
        ('mmcv', '2.1.0', 'python -m mmspatialmamba.install_mmcv'),
        ('onedl-mmcv', '2.3.6', 'python -m mmspatialmamba.install_mmcv onedl-mmcv==2.3.6'),
        ('mmcv-lite', '2.1.0', 'pip uninstall mmcv-lite && python -m mmspatialmamba.install_mmcv'),
    ],
)
def test_the_doctor_names_the_command_for_ops_that_do_not_load(name, version, command, tmp_path):
    fake_mmcv(tmp_path, version, name, library=b'of another PyTorch')
    result = doctor(tmp_path)
    assert result.returncode == 1
    assert f'mmcv: {name} {version}, not with the ops that this machine needs' in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if 'mmcv.ops' in line or "mmcv's ops" in line)
    assert line.startswith("advice: mmcv's ops do not load (ImportError: ")
    assert line.endswith(f': {command}')


def test_an_mmcv_that_says_it_is_of_another_pytorch_is_not_trusted(tmp_path):
    other = install_mmcv.target([]).replace(torch.__version__, '1.0.0')
    fake_mmcv(tmp_path, stamp=other)
    advice = f"advice: mmcv's ops were compiled for {other}, this is {install_mmcv.target([])}; detectors need them: "
    assert advice + install_mmcv.COMMAND in doctor(tmp_path).stdout


def test_an_mmcv_that_says_nothing_is_used_but_not_vouched_for(tmp_path):
    loads = 'import mmspatialmamba.install_mmcv as module; module.find_fault = lambda architectures: ""'
    fake_mmcv(tmp_path)
    silent = doctor(tmp_path, loads)
    line = 'mmcv: mmcv 2.1.0, with its ops, which load. Nothing says for which PyTorch they were compiled\n'
    assert silent.returncode == 0
    assert line in silent.stdout
    install = f'{loads}; module.cuda_architectures = lambda: []; sys.exit(module.main([]))'
    said = doctor(tmp_path, install).stdout
    assert 'its ops load. Nothing says for which PyTorch' in said
    assert f'fit {install_mmcv.target([])}' not in said
    (tmp_path / 'mmcv' / install_mmcv.STAMP).write_text(install_mmcv.target([]))
    assert 'mmcv: mmcv 2.1.0, with its ops\n' in doctor(tmp_path, loads).stdout
    assert f'fit {install_mmcv.target([])}\n' in doctor(tmp_path, install).stdout


CARD = """
import torch
import torch.utils.cpp_extension
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index: 'a card'
torch.cuda.get_device_capability = lambda index=0: {capability}
torch.version.cuda = '13.0'
import mmspatialmamba.install_mmcv as module
module.subprocess.run = lambda *args, **options: __import__('subprocess').CompletedProcess(args, 0, '', '')
"""


@pytest.mark.parametrize(
    ('capability', 'library', 'line'),
    [
        ((9, 0), FATBIN.read_bytes(), 'mmcv: mmcv 2.1.0, with its ops, CUDA ops for compute_90, sm_80, sm_90'),
        ((12, 0), FATBIN.read_bytes(), 'mmcv: mmcv 2.1.0, with its ops, CUDA ops for compute_90, sm_80, sm_90'),
        ((7, 5), FATBIN.read_bytes(), "mmcv's CUDA ops are for compute_90, sm_80, sm_90, not for GPUs of 7.5"),
        ((9, 0), b'no code for GPUs', 'advice: mmcv has no CUDA ops; detectors need them: '),
    ],
)
def test_the_doctor_compares_cuda_ops_with_the_card(capability, library, line, tmp_path):
    fake_mmcv(tmp_path, library=library)
    printed = doctor(tmp_path, CARD.format(capability=capability)).stdout
    assert f'GPU 0: a card, sm_{capability[0]}{capability[1]}' in printed
    assert line in printed


def test_without_mmcv_the_backbones_work_and_the_doctor_runs():
    code = """
import sys
sys.modules['mmcv'] = None
import torch
import torch.utils.cpp_extension
from mmengine.registry import MODELS
import mmspatialmamba
backbone = MODELS.build(dict(type='mmspatialmamba.SpatialMamba', arch=dict(embed_dims=8, depths=(1, 1, 1, 1))))
print(tuple(backbone.eval()(torch.zeros(1, 3, 32, 32))[-1].shape))
from mmspatialmamba.__main__ import main
sys.exit(main())
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.stdout.startswith('(1, 64, 1, 1)\n'), result.stderr
    assert 'advice: mmcv cannot be imported (ModuleNotFoundError: ' in result.stdout


@pytest.mark.parametrize(
    ('card', 'served'),
    [('8.0', True), ('8.6', True), ('9.0a', True), ('9.0+PTX', True), ('10.0', False), ('7.5', False)],
)
def test_machine_code_runs_on_cards_of_its_major_version(card, served):
    assert any(install_mmcv.runs_on(card, *code) for code in [('sm', 80), ('sm', 90)]) == served
    assert install_mmcv.runs_on(card, 'compute', 75)


def test_what_is_kept_is_kept_by_all_that_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    kept = install_mmcv.cache_folder('mmcv==2.1.0', ['9.0'])
    kept.mkdir(parents=True)
    wheel = kept / 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    wheel.touch()
    assert install_mmcv.cached_wheel('mmcv==2.1.0', ['9.0']) == wheel
    assert install_mmcv.cached_wheel('mmcv==2.1.0', ['8.6']) is None
    assert install_mmcv.cached_wheel('mmcv==2.1.0', []) is None
    assert install_mmcv.cached_wheel('mmcv==2.2.0', ['9.0']) is None
    for attribute, other in ((torch, '2.0.0'), (torch.version, '12.1')):
        name = '__version__' if attribute is torch else 'cuda'
        with monkeypatch.context() as patch:
            patch.setattr(attribute, name, other)
            assert install_mmcv.cached_wheel('mmcv==2.1.0', ['9.0']) is None


def test_the_default_is_what_the_requirements_name():
    assert install_mmcv.REQUIREMENT in (ROOT / 'requirements' / 'openmmlab.txt').read_text().splitlines()


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ({'FORCE_CUDA': '1'}, 'is a build without CUDA'),
        ({'FORCE_CUDA': '1', 'cuda': '13.0'}, 'name its compute capability, such as TORCH_CUDA_ARCH_LIST=8.6'),
        (
            {'FORCE_CUDA': '1', 'cuda': '13.0', 'TORCH_CUDA_ARCH_LIST': 'Hopper'},
            "expected compute capabilities such as 8.6, got 'Hopper'",
        ),
    ],
)
def test_architectures_that_cannot_be_told_are_asked_for(setting, message, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', setting.pop('cuda', None))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST'):
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        install_mmcv.cuda_architectures()


def toolkit(folder, version, compiles=True):
    """A CUDA toolkit as far as it is looked at: an nvcc of a version, and the headers."""
    for name in ('bin/nvcc', 'include/cuda_runtime.h', 'include/cublas_v2.h'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    script = f'case $1 in --version) echo "release {version}, V{version}.0";; *) exit {int(not compiles)};; esac'
    (folder / 'bin' / 'nvcc').write_text(f'#!/bin/sh\n{script}\n')
    (folder / 'bin' / 'nvcc').chmod(0o755)
    return folder


def test_a_toolkit_is_judged_by_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert install_mmcv.toolkit_fault(toolkit(tmp_path / 'fits', '13.1')) == ''
    assert 'is of CUDA 12.4, PyTorch' in install_mmcv.toolkit_fault(toolkit(tmp_path / 'older', '12.4'))
    broken = toolkit(tmp_path / 'broken', '13.0', compiles=False)
    assert 'does not compile an empty kernel' in install_mmcv.toolkit_fault(broken)
    shutil.rmtree(broken / 'include')
    assert install_mmcv.toolkit_fault(broken) == f'{broken} has no include/cuda_runtime.h'


def test_the_toolkit_of_the_machine_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.utils.cpp_extension, 'CUDA_HOME', str(toolkit(tmp_path, '13.0')))
    monkeypatch.setattr(install_mmcv, 'pip', lambda *arguments: pytest.fail('asks PyPI'))
    assert install_mmcv.find_cuda_home() == tmp_path


@pytest.mark.parametrize(('cuda', 'reason'), [('12.8', 'PyPI has no nvcc for CUDA 12.8'), ('13.0', 'cannot be')])
def test_without_a_compiler_for_gpus_the_message_says_what_to_do(cuda, reason, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.utils.cpp_extension, 'CUDA_HOME', None)
    monkeypatch.setenv('PIP_NO_INDEX', '1')  # as without a network
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    with pytest.raises(SystemExit, match=reason) as raised:
        install_mmcv.find_cuda_home()
    for part in (f'install the CUDA toolkit {cuda} (https://', 'set CUDA_HOME', '--without-cuda'):
        assert part in str(raised.value)


def test_packages_of_nvidia_get_the_names_that_compilers_look_for(tmp_path):
    (tmp_path / 'cu13' / 'lib').mkdir(parents=True)
    (tmp_path / 'cu13' / 'lib' / 'libcudart.so.13').write_text('runtime')
    for _ in range(2):
        assert install_mmcv.link_toolkit(tmp_path, '13.0') == tmp_path / 'cu13'
    assert (tmp_path / 'cu13' / 'lib64' / 'libcudart.so').read_text() == 'runtime'


EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ext", NULL, -1, NULL};
PyMODINIT_FUNC PyInit__ext(void) { return PyModule_Create(&module); }
"""
SETUP = """
import os
from setuptools import Extension, setup
assert os.environ['MMCV_WITH_OPS'] == '1' and os.environ['FORCE_CUDA'] == '0'
setup(name='mmcv', version='2.1.9', packages=['mmcv'], ext_modules=[Extension('mmcv._ext', ['ext.c'])])
"""


@pytest.fixture
def environment(tmp_path):
    """A command in an environment of its own, which sees the packages of this one; pip finds a small mmcv alone."""
    venv.create(tmp_path / 'venv', with_pip=True)
    (packages,) = (tmp_path / 'venv').glob('lib/python*/site-packages')
    paths = [path for path in sys.path if path.endswith('site-packages')]
    (packages / 'parent.pth').write_text('import site; ' + '; '.join(f'site.addsitedir({path!r})' for path in paths))
    source = tmp_path / 'mmcv-2.1.9'
    (source / 'mmcv').mkdir(parents=True)
    (source / 'mmcv' / '__init__.py').touch()
    (source / 'mmcv' / 'ops.py').write_text('from . import _ext')
    (source / 'ext.c').write_text(EXTENSION)
    (source / 'setup.py').write_text(SETUP)
    (source / 'MANIFEST.in').write_text('include ext.c\n')
    (source / 'PKG-INFO').write_text('Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.9\n')
    with tarfile.open(tmp_path / 'mmcv-2.1.9.tar.gz', 'w:gz') as archive:
        archive.add(source, source.name)
    settings = {
        'PIP_NO_INDEX': '1',
        'PIP_FIND_LINKS': str(tmp_path),
        'PIP_CONFIG_FILE': os.devnull,
        'XDG_CACHE_HOME': str(tmp_path / 'cache'),
    }
    kept = {name: value for name, value in os.environ.items() if name not in ('FORCE_CUDA', 'PYTHONPATH')}

    def run():
        command = [tmp_path / 'venv' / 'bin' / 'python', '-m', 'mmspatialmamba.install_mmcv', 'mmcv==2.1.9']
        return subprocess.run(command, env=kept | settings, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run, packages, tmp_path / 'mmcv-2.1.9.tar.gz'


@pytest.mark.end_to_end
def test_a_wheel_is_compiled_kept_and_loaded(environment):
    run, packages, sdist = environment
    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.endswith(f'its ops were compiled for {install_mmcv.target([])}, and load\n')
    assert (packages / 'mmcv' / install_mmcv.STAMP).read_text() == install_mmcv.target([])
    assert install_mmcv.STAMP in (packages / 'mmcv-2.1.9.dist-info' / 'RECORD').read_text()  # pip removes it too

    sdist.unlink()
    assert f'mmcv==2.1.9 is installed, and its ops fit {install_mmcv.target([])}\n' == run().stdout

    (library,) = (packages / 'mmcv').glob('_ext.*')
    library.unlink()
    library.write_text('of another PyTorch')
    repaired = run()
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert 'compiling' not in repaired.stdout
    assert repaired.stdout.endswith(', and load\n')

    shutil.rmtree(packages.parents[2].parent / 'cache')
    library.unlink()
    library.write_text('of another PyTorch')
    failed = run()
    assert failed.returncode == 1
    assert 'mmcv==2.1.9: its output says why this failed: ' in failed.stderr.splitlines()[-1]
