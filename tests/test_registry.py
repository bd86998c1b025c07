"""How configs of each toolbox find the backbone, and what importing the plugin needs."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mmspatialmamba.ops.backends import library_name

import mmspatialmamba

OPS = str(Path(mmspatialmamba.ops.__file__).parent)
TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
TORCHVISION = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import torchvision_setup
"""
SMALL = 'arch=dict(embed_dims=8, depths=(1, 1, 1, 1))'


def run(code):
    """Runs code in a fresh interpreter and returns what it printed last."""
    environment = {name: value for name, value in os.environ.items() if name != 'MMSPATIALMAMBA_REQUIRE'}
    command = [sys.executable, '-c', textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def hide(*modules):
    """Code that makes the modules impossible to import."""
    return f'import sys; sys.modules.update(dict.fromkeys({modules!r}))\n'


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_plain_name_with_custom_imports(toolbox):
    code = (
        hide(*(other for other in TOOLBOXES if other != toolbox))
        + TORCHVISION
        + f"""
from mmengine.config import Config
from mmengine.registry import init_default_scope
Config(dict(custom_imports=dict(imports=['mmspatialmamba'], allow_failed_imports=False)))
import mmspatialmamba
init_default_scope({toolbox!r})
from {toolbox}.registry import MODELS
print(type(MODELS.build(dict(type='SpatialMamba', {SMALL}))).__name__)
"""
    )
    assert run(code) == 'SpatialMamba'


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_scoped_name_without_custom_imports(toolbox):
    code = (
        TORCHVISION
        + f"""
import sys
from mmengine.registry import init_default_scope
init_default_scope({toolbox!r})
from {toolbox}.registry import MODELS
assert 'mmspatialmamba' not in sys.modules
print(type(MODELS.build(dict(type='mmspatialmamba.SpatialMamba', {SMALL}))).__name__)
"""
    )
    assert run(code) == 'SpatialMamba'


def test_import_needs_no_toolbox_and_no_triton():
    code = (
        hide(*TOOLBOXES, 'triton', 'torchvision')
        + """
import mmspatialmamba
imported = [name for name in ('mmdet', 'mmseg', 'mmpretrain') if sys.modules.get(name)]
print(imported, mmspatialmamba.ops.backends()['cuda'].implementation)
"""
    )
    assert run(code) == '[] reference'


@pytest.mark.parametrize('kernels', ['none', 'of another PyTorch', 'broken'])
def test_without_kernels_the_import_is_silent_and_the_first_op_says_what_builds_them(kernels, tmp_path):
    folder = tmp_path / 'ops'
    shutil.copytree(OPS, folder, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    for variant in ('default', 'avx2', 'avx512'):
        if kernels == 'of another PyTorch':  # which may load, and go wrong later
            (folder / f'{library_name(variant).partition("_torch")[0]}_torch1_0.so').write_text('no library')
        elif kernels == 'broken':
            (folder / f'{library_name(variant)}.so').write_text('no library')
    code = (
        hide('mmengine', 'mmcv', 'triton', *TOOLBOXES)
        + f"""
import importlib.util, warnings
sys.modules['mmspatialmamba'] = type(sys)('mmspatialmamba')
spec = importlib.util.spec_from_file_location(
    'mmspatialmamba.ops', {str(folder / '__init__.py')!r}, submodule_search_locations=[{str(folder)!r}])
ops = importlib.util.module_from_spec(spec)
sys.modules['mmspatialmamba.ops'] = ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    spec.loader.exec_module(ops)
    silent = not caught
    import torch
    for _ in range(2):
        ops.gated_norm(*(torch.ones(1, 2, 2, 3),) * 2, *(torch.ones(3),) * 2, 1e-5)
        ops.scan_states(*(torch.ones(1, 2, 3),) * 2, -torch.ones(3), torch.ones(1, 2, 1))
print(silent, *(str(warning.message) for warning in caught), sep=' | ')
"""
    )
    silent, *warned = run(code).split(' | ')
    assert silent == 'True'
    assert len(warned) == 1
    assert warned[0].startswith('mmspatialmamba::gated_norm: plain PyTorch computes the ops on cpu, slowly: ')
    assert ('does not load' in warned[0]) == (kernels == 'broken')
    assert ('_torch1_0' in warned[0]) == (kernels == 'of another PyTorch')
    assert warned[0].endswith('MMSPATIALMAMBA_BUILD_OPS=1 pip install --no-build-isolation --no-deps -e .')


def test_missing_ops_say_how_to_install():
    code = (
        hide('mmspatialmamba.ops')
        + """
try:
    import mmspatialmamba
except RuntimeError as error:
    print(error)
"""
    )
    assert 'not installed properly: run "pip install --no-build-isolation -e ."' in run(code)


def test_a_required_backend_that_is_missing_raises():
    code = """
import os
os.environ['MMSPATIALMAMBA_REQUIRE'] = 'cuda'
try:
    import mmspatialmamba
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "MMSPATIALMAMBA_REQUIRE: expected names among cpp, triton, got 'cuda'"
