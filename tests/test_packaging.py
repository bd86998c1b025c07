"""What the wheel and the source distribution hold, and that they need no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """The sdist of the files that git does not ignore, and the wheel built from that sdist, without compiled ops."""
    folder = tmp_path_factory.mktemp('dist')
    source = folder / 'source'
    command = ('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
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
    assert expected <= set(names)


def test_wheel_requires_no_openmmlab_distribution(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith('METADATA'))
        lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert [line for line in required if 'mm' in line] == []
    assert 'Provides-Extra: openmmlab' in lines
    assert 'Provides-Extra: onedl' in lines


def test_wheel_works_without_the_checkout(distributions, tmp_path):
    _, wheel = distributions
    site = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / 'own.py').write_text("_base_ = [__import__('mmspatialmamba').config_path('quickstart_mask_rcnn.py')]")
    code = (
        'import mmspatialmamba\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import MODELS, init_default_scope\n'
        'config = Config.fromfile("own.py")\n'
        'init_default_scope(config.default_scope)\n'
        'model = MODELS.build(config.model)\n'
        'print(mmspatialmamba.__file__, type(model).__name__, type(model.backbone).__name__)'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site), 'MMSPATIALMAMBA_REQUIRE': ''},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(site / 'mmspatialmamba' / '__init__.py'), 'MaskRCNN', 'SpatialMamba']


def test_sdist_holds_what_a_build_needs(distributions):
    unpacked, _ = distributions
    for name in ('README.md', 'LICENSE', 'requirements/openmmlab.txt', 'ops/library.py'):
        assert (unpacked / name).exists(), name


def test_mim_reads_the_metafile():
    from mim.commands.search import convert2df
    from modelindex.load_model_index import load

    models = convert2df(load(str(ROOT / 'model-index.yml')))
    assert len(models) == 11
    assert [name for name in models.index if not (ROOT / 'configs' / f'{name}.py').exists()] == []
