"""Packaging of mmspatialmamba; the folder ``ops`` is the source of the package ``mmspatialmamba.ops``."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = (ROOT / 'mmspatialmamba' / 'version.py').read_text().split("__version__ = '")[1].split("'")[0]


def requirements(name: str) -> list[str]:
    """Returns the lines of ``requirements/<name>.txt`` without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='mmspatialmamba',
    version=VERSION,
    description='Spatial-Mamba as a backbone for OpenMMLab detection, segmentation and classification',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=['mmspatialmamba', 'mmspatialmamba.models', 'mmspatialmamba.ops'],
    package_dir={'mmspatialmamba.ops': 'ops'},
    install_requires=['torch>=2.6'],
    # The OpenMMLab distributions are extras, never requirements: their maintained forks (onedl-*) own the same modules,
    # and pip would write over them.
    extras_require={name: requirements(name) for name in ('openmmlab', 'onedl', 'mim', 'test')},
)
