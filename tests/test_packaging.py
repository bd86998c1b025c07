"""What the wheel and the source distribution hold, and that they need no checkout."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from mmspatialmamba.ops.backends import BUILT_FOR, library_name

import mmspatialmamba

ROOT = Path(__file__).parents[1]


def copy_checkout(source, links=True):
    """Copies the files that git does not ignore; without ``links`` with text files for them, as in Git for Windows."""
    command = ('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() and not links:
            target.write_text(str((ROOT / name).readlink()))
        else:
            shutil.copy2(ROOT / name, target, follow_symlinks=False)


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """The sdist of the files that git does not ignore, and the wheel built from that sdist, without compiled ops."""
    folder = tmp_path_factory.mktemp('dist')
    source = folder / 'source'
    copy_checkout(source)
    build(source, f'build_sdist({str(folder)!r})')
    (sdist,) = folder.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / 'unpacked', filter='data')
    (unpacked,) = (folder / 'unpacked').iterdir()
    build(unpacked, f'build_wheel({str(folder)!r})')
    (wheel,) = folder.glob('*.whl')
    return unpacked, wheel


def build(folder, call):
    subprocess.run(
        [sys.executable, '-c', f'from setuptools import build_meta; build_meta.{call}'],
        cwd=folder,
        check=True,
        env={**os.environ, 'MMSPATIALMAMBA_BUILD_OPS': '0'},
        stdout=subprocess.DEVNULL,
    )


def test_wheel_contents(distributions):
    _, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0].partition('-')[0] for name in names} == {'mmspatialmamba'}
    expected = {f'mmspatialmamba/{path.relative_to(ROOT)}' for path in (ROOT / 'ops').rglob('*.py')}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / 'mmspatialmamba').rglob('*.py')}
    assert expected | {'mmspatialmamba/py.typed'} <= set(names)


def test_without_kernels_the_wheel_is_universal(distributions):
    unpacked, wheel = distributions
    assert wheel.name == f'mmspatialmamba-{mmspatialmamba.__version__}-py3-none-any.whl'
    assert unpacked.name == f'mmspatialmamba-{mmspatialmamba.__version__}'


@pytest.fixture(scope='module')
def bound():
    """What setup.py says of a wheel with kernels, without compiling them."""
    code = (
        'import sys, setuptools\n'
        'sys.argv = ["setup.py", "--version"]\n'
        'made = {}\n'
        'setuptools.setup = lambda **given: made.update(given)\n'
        'exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "setup"})\n'
        'names = [extension.name for extension in made["ext_modules"]]\n'
        'limited = all(extension.py_limited_api for extension in made["ext_modules"])\n'
        'import json\n'
        'keys = ("version", "install_requires", "options", "long_description", "project_urls")\n'
        'print(json.dumps({key: made[key] for key in keys} | {"names": names, "limited": limited}))\n'
    )
    environment = {
        'MMSPATIALMAMBA_BUILD_OPS': '1',
        'MMSPATIALMAMBA_CPU_VARIANTS': 'all',
        'MMSPATIALMAMBA_REPOSITORY': 'https://example.org/mmspatialmamba',
    }
    printed = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout.splitlines()[-1])


def test_a_wheel_with_kernels_is_bound_to_its_pytorch_and_to_no_python(bound):
    minor = '.'.join(torch.__version__.split('.')[:2])
    assert bound['version'] == f'{mmspatialmamba.__version__}+torch{minor}'
    assert bound['install_requires'] == [f'torch=={minor}.*']
    assert bound['options'] == {'bdist_wheel': {'py_limited_api': 'cp310'}}
    assert bound['limited']
    assert set(bound['names']) >= {f'mmspatialmamba.ops.{library_name("default")}'}


def test_the_kernels_hold_no_symbol_of_python():
    libraries = list(Path(mmspatialmamba.ops.__file__).parent.glob(f'_cpu_*_{BUILT_FOR}.*'))
    if not libraries:
        pytest.skip('the C++ kernels are not built')
    for library in libraries:
        table = subprocess.run(['nm', '-D', library], capture_output=True, text=True, check=True).stdout
        assert [name for name in re.findall(r'\S+$', table, re.MULTILINE) if re.match('_?Py', name)] == []
        assert '_ZN2at' in table  # those of PyTorch are


def test_links_and_pictures_of_a_released_readme_are_addresses(bound):
    targets = re.findall(r'\]\(([^)]*)\)', bound['long_description'])
    assert targets
    assert [target for target in targets if not target.startswith(('https://', '#'))] == []
    pictures = re.findall(r'!\[[^\]]*\]\(([^)]*)\)', bound['long_description'])
    root = f'https://example.org/mmspatialmamba/raw/v{mmspatialmamba.__version__}/'
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture.removeprefix(root)).is_file()] == []
    assert bound['project_urls']['Repository'] == 'https://example.org/mmspatialmamba'


def test_wheel_and_configs_of_a_checkout_without_symbolic_links(distributions, tmp_path):
    source = tmp_path / 'source'
    copy_checkout(source, links=False)
    assert (source / 'mmspatialmamba' / '.mim' / 'configs').is_file()
    build(source, f'build_wheel({str(tmp_path)!r})')
    (wheel,) = tmp_path.glob('*.whl')
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(distributions[1]).namelist())
    spec = importlib.util.spec_from_file_location('configs', source / 'mmspatialmamba' / 'configs.py')
    configs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configs)
    assert configs.config_path('mask_rcnn_sm_t.py') == str(source / 'configs' / 'mask_rcnn_sm_t.py')


@pytest.fixture(scope='module')
def site(distributions, tmp_path_factory):
    """The wheel as installed, without the checkout."""
    folder = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(distributions[1]).extractall(folder)
    return folder


def run_outside(site, folder, *command):
    """Runs Python in a folder where only the installed wheel is to be found, and returns what it prints."""
    environment = {**os.environ, 'PYTHONPATH': str(site), 'MMSPATIALMAMBA_REQUIRE': ''}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize('tool', sorted(path.name for path in (ROOT / 'tools').glob('*.py')))
def test_tools_of_the_wheel_start(tool, site, tmp_path):
    assert run_outside(site, tmp_path, site / 'mmspatialmamba' / '.mim' / 'tools' / tool, '--help').startswith(
        'usage: '
    )


@pytest.mark.end_to_end
def test_tools_of_the_wheel_find_what_they_need(site, tmp_path):
    tools = site / 'mmspatialmamba' / '.mim' / 'tools'
    swept = run_outside(site, tmp_path, tools / 'sweep_zoo.py', 'mmdet', '--filter', 'retinanet_r18_fpn_1x_coco.py')
    assert 'mmdet: 1 configs, 1 build unswapped, 1 of these work swapped, 1 in all' in swept
    assert (tmp_path / 'zoo_coverage.md').exists()
    run_outside(site, tmp_path, tools / 'make_shapes_dataset.py', 'shapes', '--train', 1, '--val', 1)
    assert (tmp_path / 'shapes' / 'complete.json').exists()
    command = ('backbones', '--models', 'spatial_mamba_t', '--sizes', '32x32', '--rounds', 1, '--out', tmp_path)
    assert 'spatial_mamba_t' in run_outside(site, tmp_path, tools / 'benchmark.py', *command)


def test_wheel_requires_no_openmmlab_distribution(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith('METADATA'))
        lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert [line for line in required if 'mm' in line] == []
    assert 'Provides-Extra: openmmlab' in lines
    assert 'Provides-Extra: onedl' in lines


def test_wheel_works_without_the_checkout(site, tmp_path):
    (tmp_path / 'own.py').write_text("_base_ = [__import__('mmspatialmamba').config_path('quickstart_mask_rcnn.py')]")
    code = (
        'import mmspatialmamba\n'
        'from mmspatialmamba.published import find_model\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import MODELS, init_default_scope\n'
        'config = Config.fromfile("own.py")\n'
        'init_default_scope(config.default_scope)\n'
        'model = MODELS.build(config.model)\n'
        'print(mmspatialmamba.__file__, type(model).__name__, type(model.backbone).__name__)\n'
        'print(find_model("spatialmamba://mask_rcnn_sm_t").config)'
    )
    printed = run_outside(site, tmp_path, '-c', code)
    assert printed.split() == [
        str(site / 'mmspatialmamba' / '__init__.py'),
        'MaskRCNN',
        'SpatialMamba',
        'mask_rcnn_sm_t.py',
    ]


def test_sdist_holds_what_a_build_needs(distributions):
    unpacked, _ = distributions
    for name in ('README.md', 'LICENSE', 'requirements/openmmlab.txt', 'ops/library.py'):
        assert (unpacked / name).exists(), name


def test_mim_reads_the_metafile():
    from mim.commands.search import convert2df
    from modelindex.load_model_index import load

    models = convert2df(load(str(ROOT / 'model-index.yml')))
    assert len(models) == 22
    assert [name for name in models.index if not (ROOT / 'configs' / f'{name}.py').exists()] == []
