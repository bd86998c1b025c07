"""Packaging of mmspatialmamba; the folder ``ops`` is the source of the package ``mmspatialmamba.ops``."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = (ROOT / 'mmspatialmamba' / 'version.py').read_text().split("__version__ = '")[1].split("'")[0]

# The OpenMMLab distributions are extras, never requirements: their maintained forks (onedl-*) own the same modules, and
# pip would write over them.
OPENMMLAB = ['mmengine==0.10.7', 'mmcv==2.1.0', 'mmdet==3.3.0', 'mmsegmentation==1.2.2', 'mmpretrain==1.2.0']
OPENMMLAB_UNDECLARED = ['ftfy', 'regex', 'importlib_metadata', 'numpy<2.3', 'setuptools>=77,<82']
ONEDL = [
    'onedl-mmengine==0.10.12',
    'onedl-mmcv==2.3.6',
    'onedl-mmdetection==3.5.1',
    'onedl-mmsegmentation==1.4.2',
    'onedl-mmpretrain==1.3.6',
]

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
    extras_require={
        'openmmlab': OPENMMLAB + OPENMMLAB_UNDECLARED,
        'onedl': ONEDL,
        'test': ['pytest>=8', 'hypothesis', 'expecttest', 'ruff'],
    },
)
