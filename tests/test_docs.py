"""The documentation site: it builds without a warning, its tables are those of the metafile, its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from mmengine.config import Config
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
NOTEBOOK = DOCS / 'tutorial.ipynb'
OUTPUT_LIMIT = 200_000
"""Bytes of the committed notebook: one small picture, no training log."""


def code_blocks(language):
    """Returns the fenced blocks of a language on all pages and in the README; not those that leave something out."""
    return [
        pytest.param(block, id=f'{page.stem}: {block.splitlines()[0]}')
        for page in (*sorted(DOCS.glob('*.md')), ROOT / 'README.md')
        for block in re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
        if not re.search(r'\.\.\.|…', block)
    ]


@pytest.mark.parametrize('block', code_blocks('python'))
def test_python_on_the_pages_compiles(block):
    compile(block, 'page', 'exec')


@pytest.mark.parametrize('block', code_blocks('bash'))
def test_commands_on_the_pages_name_files_that_exist(block):
    for name in re.findall(r'\b(?:tools|configs|requirements)/[\w./]+', block):
        assert (ROOT / name).exists(), name


def test_own_data_config_has_one_value_for_each_setting():
    config = Config.fromfile(DOCS / 'own_data_config.py')
    classes = config.classes
    assert config.model.roi_head.bbox_head.num_classes == config.model.roi_head.mask_head.num_classes == len(classes)
    for loader, annotations in ((config.train_dataloader, 'train.json'), (config.val_dataloader, 'val.json')):
        assert loader.dataset.data_root == config.data_root
        assert loader.dataset.metainfo.classes == classes
        assert loader.dataset.ann_file == annotations
        assert loader.dataset.data_prefix.img == 'images/'
    assert config.test_dataloader == config.val_dataloader
    assert config.test_evaluator == config.val_evaluator
    assert config.val_evaluator.ann_file == config.data_root + 'val.json'
    warmup_steps = config.param_scheduler[0].end
    assert warmup_steps <= 5 * config.epochs / 4, 'ten images at two a step: a quarter of the run at most'


def test_own_segmentation_config_has_one_value_for_each_setting():
    config = Config.fromfile(DOCS / 'own_segmentation_config.py')
    classes = config.classes
    assert config.model.decode_head.num_classes == config.model.auxiliary_head.num_classes == len(classes)
    for loader, split in ((config.train_dataloader, 'train'), (config.val_dataloader, 'val')):
        assert loader.dataset.type == 'BaseSegDataset'
        assert loader.dataset.data_root == config.data_root
        assert loader.dataset.metainfo.classes == classes
        assert dict(loader.dataset.data_prefix) == {'img_path': f'images/{split}/', 'seg_map_path': f'masks/{split}/'}
        assert not any(step.get('reduce_zero_label') for step in loader.dataset.pipeline)
    assert config.test_dataloader == config.val_dataloader
    crop = next(step for step in config.train_dataloader.dataset.pipeline if step.type == 'RandomCrop')
    assert tuple(crop.crop_size) == tuple(config.model.data_preprocessor.size) == tuple(config.image_size)
    assert config.param_scheduler[-1].end == config.train_cfg.max_iters == config.iterations
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval


def label_map_script(numbers):
    """Returns the page's script that writes label maps, with other numbers."""
    page = (DOCS / 'own_segmentation.md').read_text()
    (script,) = (
        block for block in re.findall(r'^```python\n(.*?)^```', page, re.DOTALL | re.MULTILINE) if 'NUMBERS' in block
    )
    return re.sub(r'^NUMBERS = .*$', f'NUMBERS = {numbers}', script, flags=re.MULTILINE)


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize('kind', ['black and white', 'gray levels', 'palette', 'colours', 'colours with opacity'])
def test_label_maps_are_written_as_the_page_says(kind, tmp_path, monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([value for colour in COLOURS for value in colour])
    by_colour = {colour: number for number, colour in enumerate(COLOURS)}
    image, numbers = {
        'black and white': (Image.fromarray(np.uint8(255) * (labels == 1)), {0: 0, 255: 1}),
        'gray levels': (Image.fromarray(labels * 50), {0: 0, 50: 1, 100: 2}),
        'palette': (palette, {0: 0, 1: 1, 2: 2}),
        'colours': (palette.convert('RGB'), by_colour),
        'colours with opacity': (palette.convert('RGBA'), by_colour),
    }[kind]
    folder = tmp_path / 'data' / 'own' / 'labelled' / 'train'
    folder.mkdir(parents=True)
    image.save(folder / '0001.png')
    monkeypatch.chdir(tmp_path)
    exec(compile(label_map_script(numbers), 'page', 'exec'), {})
    written = Image.open(tmp_path / 'data' / 'own' / 'masks' / 'train' / '0001.png')
    assert written.mode == 'L'
    assert (np.array(written) == ((labels == 1) if kind == 'black and white' else labels)).all()


def test_label_maps_have_255_for_what_is_no_class(tmp_path, monkeypatch):
    folder = tmp_path / 'data' / 'own' / 'labelled'
    folder.mkdir(parents=True)
    Image.fromarray(np.array([[0, 9, 255]], np.uint8)).save(folder / '0001.png')
    monkeypatch.chdir(tmp_path)
    exec(compile(label_map_script({0: 0, 255: 1}), 'page', 'exec'), {})
    written = np.array(Image.open(tmp_path / 'data' / 'own' / 'masks' / '0001.png'))
    assert written.tolist() == [[0, 255, 1]]


def test_notebook_is_valid_and_light():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < OUTPUT_LIMIT
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get('outputs', [])
        if 'image/jpeg' in output.get('data', {})
    ]
    assert len(pictures) <= 1


@pytest.mark.end_to_end
def test_notebook_trains_a_detector():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(DOCS)}}).execute()
    printed = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', []))
    found = {part: float(ap) for part, ap in re.findall(r'^(bbox|segm) AP \S+, AP50 (\S+)$', printed, re.MULTILINE)}
    assert min(found['bbox'], found['segm']) >= 0.4, found


@pytest.mark.end_to_end
def test_site_builds_without_a_warning(tmp_path):
    command = (sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q')
    result = subprocess.run(
        (*command, '-d', tmp_path / 'doctrees', DOCS, tmp_path / 'site'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]

    zoo = (tmp_path / 'site' / 'model_zoo.html').read_text()
    for model in yaml.safe_load((ROOT / 'configs' / 'metafile.yml').read_text())['Models']:
        assert Path(model['Config']).name in zoo
        assert model['Weights'] in zoo
        for result in model['Results']:
            for value in result['Metrics'].values():
                assert f'{value:.1f}' in zoo
    ops = (tmp_path / 'site' / 'ops.html').read_text()
    for name in ('structure_aware_ssm', 'scan_states', 'state_fusion', 'fusion_taps', 'backends'):
        assert f'id="mmspatialmamba.ops.{name}"' in ops
