"""`tools/check_dataset.py`: a clean data set has no findings, each spoilt copy has its own; the page in a browser."""

import json
import math
import re
import shutil

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from tool_runner import ROOT, browser_page, load_tool, run_tool

from mmspatialmamba.dataset_checks import Findings, ImageChecks, read_form

check_dataset = load_tool('check_dataset')
make_shapes = load_tool('make_shapes_dataset')

DETECTION = """
_base_ = [{base!r}]
data_root = {root!r}
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
"""
SEGMENTATION = """
_base_ = [{base!r}]
data_root = {root!r}
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
"""


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    with pytest.MonkeyPatch.context() as patch:
        arguments = ('--train', 12, '--val', 6, '--size', 96, 128, '--seed', 3)
        run_tool(make_shapes, folder, *arguments, monkeypatch=patch)
    return folder


@pytest.fixture(scope='session')
def bases(tmp_path_factory):
    """The quick start's configs, resolved: that takes longer than the checks."""
    folder = tmp_path_factory.mktemp('configs')
    for name in ('quickstart_mask_rcnn', 'quickstart_upernet'):
        config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        for loader in (config.train_dataloader, config.val_dataloader):
            loader.dataset.serialize_data = False  # it collects garbage
        config.dump(folder / f'{name}.py')
    return folder


class Case:
    """A copy of the shapes to spoil, and a config for it.

    Attributes:
        folder: The copy.
    """

    def __init__(self, folder, config, base, monkeypatch, capsys):
        self.folder, self.config, self.base = folder, config, base
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.page = folder.parent / 'page.html'

    def check(self, change='', *options):
        """Runs the tool on the config with some lines more; returns exit status and findings."""
        path = self.folder.parent / 'my_config.py'
        path.write_text(self.config.format(base=str(self.base), root=f'{self.folder}/') + change)
        arguments = (path, '--out', self.page, '--pictures', 2, *options)
        status = run_tool(check_dataset, *arguments, monkeypatch=self.monkeypatch)
        self.printed = self.capsys.readouterr().out
        found = re.findall(r'^(error|warning|note) +(.*)\n +-> (.*)$', self.printed, re.MULTILINE)
        return status, found

    def expect(self, level, text, advice, change='', only=True):
        """Runs the tool; it has to have this finding, and, with ``only``, none that is an error beside it."""
        status, found = self.check(change)
        matching = [finding for finding in found if finding[0] == level and re.search(text, finding[1])]
        assert matching, found
        assert any(re.search(advice, finding[2]) for finding in matching), matching
        assert status == any(finding[0] == 'error' for finding in found)
        if only:
            assert [finding for finding in found if finding[0] == 'error' and finding not in matching] == []


class Detection(Case):
    def file(self, split='train'):
        return self.folder / 'annotations' / f'instances_{split}2017.json'

    def edit(self, change, splits=('train', 'val')):
        for split in splits:
            content = json.loads(self.file(split).read_text())
            self.file(split).write_text(json.dumps(change(content) or content))

    def images(self, split='train'):
        return sorted((self.folder / f'{split}2017').iterdir())


class Segmentation(Case):
    def images(self, split='train'):
        return sorted((self.folder / 'images' / split).iterdir())

    def masks(self, split='train'):
        return sorted((self.folder / 'masks' / split).iterdir())

    def edit(self, change, splits=('train', 'val')):
        """Applies a function of an array to all masks; it returns an array or an image of Pillow."""
        for split in splits:
            for path in self.masks(split):
                image = change(np.array(Image.open(path)))
                (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


@pytest.fixture
def detection(shapes, bases, tmp_path, monkeypatch, capsys):
    shutil.copytree(shapes / 'coco', tmp_path / 'coco')
    return Detection(tmp_path / 'coco', DETECTION, bases / 'quickstart_mask_rcnn.py', monkeypatch, capsys)


@pytest.fixture
def segmentation(shapes, bases, tmp_path, monkeypatch, capsys):
    shutil.copytree(shapes / 'masks', tmp_path / 'masks')
    return Segmentation(tmp_path / 'masks', SEGMENTATION, bases / 'quickstart_upernet.py', monkeypatch, capsys)


def test_clean_detection_has_no_findings(detection):
    assert detection.check() == (0, [])
    assert '0 errors, 0 warnings, 0 notes' in detection.printed
    table = dict(re.findall(r'^    (circle|square|triangle) +\d+ +(\d+) +0$', detection.printed, re.MULTILINE))
    annotations = json.loads(detection.file().read_text())['annotations']
    assert int(table['circle']) > 0
    assert f'objects       {len(annotations)}, and 0 that are ignored' in detection.printed


def test_clean_segmentation_has_no_findings(segmentation):
    assert segmentation.check() == (0, [])
    assert 'files         12 JPEG of 3 channels of 8 bits' in segmentation.printed


def each(key):
    """Returns a change of every annotation."""
    return lambda change: lambda content: [change(entry) for entry in content[key]] and None


annotations = each('annotations')
images = each('images')


def add_roboflow(content):
    content['categories'] = [{'id': 0, 'name': 'circle', 'supercategory': 'none'}, *content['categories']]


def rename(old, new):
    def change(content):
        for category in content['categories']:
            category['name'] = new if category['name'] == old else category['name']

    return change


def drop(key, name='annotations'):
    return each(name)(lambda entry: entry.pop(key))


def set_to(key, value, name='annotations'):
    return each(name)(lambda entry: entry.update({key: value(entry) if callable(value) else value}))


def first(**values):
    return lambda content: content['annotations'][0].update(values)


def to_code(entry):
    return {'size': [96, 128], 'counts': [96 * 128 - 200, 200]}


def to_corners(entry):
    left, top, width, height = entry['bbox']
    return [left, top, left + width, top + height]


FILES = {
    'two categories of one name': (add_roboflow, 'error', "2 categories have the name 'circle'.*ids 0, 1", 'Roboflow'),
    'two used categories of one name': (
        rename('square', 'circle'), 'error', "no category has the name 'square'|2 categories", 'different names|names'),
    'another case': (rename('circle', 'Circle'), 'error', "no category has the name 'circle'", "'Circle' for 'circle'"),
    'a blank': (rename('circle', 'circle '), 'error', "no category has the name 'circle'", "'circle ' for 'circle'"),
    'names that are no text': (rename('circle', 7), 'error', 'names of 1 categories are no text: 7', 'quotes'),
    'another order': (
        lambda content: content['categories'].reverse(), 'warning', "another order than the categories, from 'circle'",
        r"classes=\('triangle', 'square', 'circle'\)"),
    'all crowd': (set_to('iscrowd', 1), 'error', r'all \d+ annotations are marked iscrowd', 'set iscrowd to 0'),
    'crowd as text': (set_to('iscrowd', '0'), 'error', "neither 0 nor 1, such as '0'", 'the number 0 or 1'),
    'no area': (drop('area'), 'error', r"(\d+) of \1 annotations have no 'area': MMDetection stops", 'width times'),
    'area of 0': (set_to('area', 0), 'error', 'an area of 0 or less and are left out', 'width times height'),
    'area as text': (set_to('area', '9'), 'error', 'area that is no finite number', 'in pixels'),
    'no iscrowd': (drop('iscrowd'), 'error', "have no 'iscrowd': COCO's evaluation stops", "'iscrowd': 0"),
    'no segmentation': (drop('segmentation'), 'error', "have no 'segmentation', or an empty one", 'without masks'),
    'empty segmentation': (set_to('segmentation', []), 'error', "have no 'segmentation', or an empty one", 'masks'),
    'no bbox': (drop('bbox'), 'error', "have no 'bbox'", r'\[left, top, width, height\]'),
    'no width': (drop('width', 'images'), 'error', "images have no 'width'", 'export'),
    'no file name': (drop('file_name', 'images'), 'error', "images have no 'file_name'", 'export'),
    'a number as file name': (
        set_to('file_name', 7, 'images'), 'error', 'file_name of 12 of 12 images is no text, such as 7', 'name of the'),
    'no category id': (drop('category_id'), 'error', "have no 'category_id'", 'export'),
    'sizes as text': (set_to('width', '128', 'images'), 'error', "no number above 0, such as '128' x 96", 'pixels'),
    'repeated annotation ids': (set_to('id', 3), 'error', 'ids of annotations repeat.*: 3', 'from 1 to the last'),
    'repeated image ids': (
        lambda content: content['images'][1].update(id=1), 'error', 'ids of images repeat', 'id of its own'),
    'repeated category ids': (
        lambda content: content['categories'][1].update(id=1), 'error', 'ids of categories repeat', 'id of its own'),
    'annotation ids as text': (
        set_to('id', lambda entry: str(entry['id'])), 'error', r"annotations are no integers: '1', '2'", 'integers'),
    'list as id': (set_to('id', lambda entry: [entry['id']]), 'error', 'annotations are no integers', 'integers'),
    'image ids as text': (
        set_to('id', lambda entry: str(entry['id']), 'images'), 'error',
        r'(\d+) of \1 annotations belong to no image', 'not text'),
    'annotation id 0': (
        set_to('id', lambda entry: entry['id'] - 1), 'note', 'val: an annotation has the id 0', 'from 1 on'),
    'boxes of no width': (
        set_to('bbox', lambda entry: [*entry['bbox'][:2], 0, 9]), 'error', 'less than one pixel', 'correct'),
    'negative boxes': (
        set_to('bbox', lambda entry: [*entry['bbox'][:2], -9, -9]), 'error', 'or a negative one', 'correct'),
    'one box of no width': (
        first(bbox=[5, 5, 0, 4]), 'warning', r'1 of \d+ annotations have a box of less than one pixel.*: ids 1', ''),
    'fractions of the image': (
        set_to('bbox', lambda entry: [entry['bbox'][0] / 128, entry['bbox'][1] / 96, entry['bbox'][2] / 128,
                                      entry['bbox'][3] / 96]),
        'error', 'less than one pixel', 'multiply them by its width'),
    'corners': (set_to('bbox', to_corners), 'error', 'reaches beyond', r'\[left, top, right, bottom\]'),
    'outside': (
        set_to('bbox', lambda entry: [500, *entry['bbox'][1:]]), 'error', 'lies outside of the image', 'another size'),
    'one outside': (first(bbox=[-50, 5, 20, 20]), 'warning', r'1 of \d+ .* outside of the image', ''),
    'one beyond': (first(bbox=[100, 5, 60, 20]), 'warning', r'1 of \d+ .* beyond the image by more than 2', ''),
    'NaN': (
        set_to('bbox', lambda entry: [math.nan, *entry['bbox'][1:]]), 'error', 'not four finite numbers', 'write'),
    'three numbers': (
        set_to('bbox', lambda entry: entry['bbox'][:3]), 'error', 'not four finite numbers', 'write'),
    'unknown image': (set_to('image_id', 999), 'error', 'belong to no image of the file', 'image_id'),
    'one unknown image': (first(image_id=999), 'warning', r'1 of \d+ annotations belong to no image', 'image_id'),
    'unknown category': (set_to('category_id', 99), 'error', 'belong to no category of the file', 'category_id'),
    'one unknown category': (first(category_id=0), 'warning', r'1 of \d+ annotations belong to no category', ''),
    'short polygons': (
        set_to('segmentation', [[1, 1, 9, 9]]), 'error', 'no polygon of three points or more', 'three points'),
    'pairs of coordinates': (
        set_to('segmentation', [[1, 1], [9, 1], [9, 9]]), 'error', 'no polygon of three points or more', 'x1, y1'),
    'a flat polygon': (
        set_to('segmentation', lambda entry: entry['segmentation'][0]), 'error', 'one list of numbers', 'of its own'),
    'a short part': (
        set_to('segmentation', lambda entry: [*entry['segmentation'], [1, 2]]), 'warning', 'beside others', 'delete'),
    'text as mask': (set_to('segmentation', 'x'), 'error', 'neither polygons nor', 'counts'),
    'NaN in a polygon': (
        set_to('segmentation', [[1, 1, 9, 1, 9, math.nan]]), 'error', 'takes all memory', 'pixels'),
    'a polygon far away': (first(segmentation=[[1, 1, 9, 1, 9, 1e9]]), 'error', '1 of .* takes all memory', 'pixels'),
    'a code of another size': (
        set_to('segmentation', {'size': [128, 96], 'counts': [0, 128 * 96]}), 'error', 'another size than', ''),
    'a code that is too short': (
        set_to('segmentation', {'size': [96, 128], 'counts': [5, 5]}), 'error', 'another size than the image', ''),
    'a code without counts': (set_to('segmentation', {'size': [96, 128]}), 'error', 'neither polygons nor', 'counts'),
    'masks of another scale': (
        set_to('segmentation', lambda entry: [[4 * value for value in entry['segmentation'][0]]]), 'error',
        'a mask somewhere else than their box', 'same size of the image'),
    'files listed twice': (
        set_to('file_name', lambda entry: '000000000001.jpg', 'images'), 'warning', 'listed more than once', 'once'),
    'a swapped size': (
        each('images')(lambda entry: entry.update(width=entry['height'], height=entry['width'])), 'error',
        'width and height exchanged', 'exchange them'),
    'another size': (
        each('images')(lambda entry: entry.update(width=2 * entry['width'], height=2 * entry['height'])), 'error',
        r'another size than in the annotations \(256 x 192 there, 128 x 96 as loaded\)', 'scale'),
    'a class without objects': (
        lambda content: content.update(
            annotations=[entry for entry in content['annotations'] if entry['category_id'] != 2]),
        'warning', "1 of 3 classes have no object: 'square'", 'take them out'),
    'other categories': (
        lambda content: content['categories'].append({'id': 9, 'name': 'hexagon'})
        or content['annotations'][0].update(category_id=9),
        'note', "1 objects of 1 other categories are left out: 'hexagon'", 'add these names'),
    'missing images': (
        set_to('file_name', lambda entry: 'photos/' + entry['file_name'], 'images'), 'error',
        'image files do not exist', "there is no folder '.*photos'"),
    'addresses': (
        set_to('file_name', lambda entry: 'https://example.org/' + entry['file_name'], 'images'), 'error',
        r"is an address, such as 'https://example\.org/", 'download the images'),
    'copies': (
        lambda content: content['annotations'].extend(
            [{**entry, 'id': entry['id'] + 1000} for entry in content['annotations'][:2]]),
        'warning', 'annotations repeat another one', 'delete the copies'),
    'backslashes': (
        set_to('file_name', lambda entry: 'x\\' + entry['file_name'], 'images'), 'error', 'not exist', '/ in place'),
    'another ending': (
        set_to('file_name', lambda entry: entry['file_name'].replace('jpg', 'JPG'), 'images'), 'error', 'do not exist',
        "there is '000000000001.jpg' in this folder"),
    'no annotations': (lambda content: content.update(annotations=[]), 'error', "'annotations' is empty", 'label the'),
    'no categories': (lambda content: content.pop('categories') and None, 'error', "the list 'categories'", 'export'),
    'labelme': (lambda content: {'shapes': [], 'imagePath': ''}, 'error', "the list 'images'.*labelme", 'export'),
    'a list': (lambda content: content['annotations'], 'error', 'expected a JSON object, found a list', 'export'),
}  # fmt: skip


@pytest.mark.parametrize('case', FILES)
def test_faults_of_files_of_annotations(detection, case):
    change, level, text, advice = FILES[case]
    detection.edit(change)
    detection.expect(level, text, advice, only=False)


@pytest.mark.parametrize(
    ('content', 'text'),
    [('', 'is no JSON: it is empty'), ('{"images": [', 'is no JSON: Expecting value'), ('\xff', 'is no JSON')],
)
def test_files_that_are_no_json(detection, content, text):
    detection.file().write_text(content)
    detection.expect('error', text, 'export it again')


def test_run_length_codes_are_no_fault(detection):
    from pycocotools import mask

    def encode(entry):
        polygons = mask.frPyObjects(entry['segmentation'], 96, 128)
        code = mask.merge(polygons)
        return {'size': [96, 128], 'counts': code['counts'].decode()}

    detection.edit(set_to('segmentation', encode))
    assert detection.check() == (0, [])


CONFIGS = {
    'a string': (
        "train_dataloader['dataset']['metainfo'] = dict(classes=('circle'))", 'error',
        "classes is the text 'circle': it counts as 6", r"classes=\('circle',\)"),
    'a wrong key': (
        "train_dataloader['dataset']['metainfo'] = dict(CLASSES=('circle', 'square', 'triangle'))", 'error',
        "metainfo has the key 'CLASSES'", "rename it to 'classes'"),
    'a repeated class': (
        "train_dataloader['dataset']['metainfo'] = dict(classes=('circle', 'square', 'circle'))", 'error',
        "classes has 'circle' more than once", 'one name'),
    'no class': ("train_dataloader['dataset']['metainfo'] = dict(classes=())", 'error', r'classes is \(\)', 'tuple'),
    'COCO by default': (
        "train_dataloader['dataset']['metainfo'] = None", 'error',
        'the config names no classes, so they are the 80 of COCO', "classes=.'circle', 'square', 'triangle'."),
    'a short palette': (
        "train_dataloader['dataset']['metainfo'] = dict(palette=[(1, 2, 3)])", 'warning',
        'palette has 1 colours for 3 classes', 'one colour'),
    'heads of another number': (
        'model = dict(roi_head=dict(bbox_head=dict(num_classes=80)))', 'error',
        'roi_head.bbox_head of the model has num_classes=80, the data set has 3 classes', 'num_classes=3'),
    'other classes for validation': (
        "val_dataloader['dataset']['metainfo'] = dict(classes=('circle', 'square'))", 'error',
        'val has other classes than train', 'same metainfo'),
    'no data': (
        "train_dataloader['dataset']['data_root'] = 'nowhere/'", 'error', 'there is no file', "no folder 'nowhere'"),
    'another file': (
        "train_dataloader['dataset']['ann_file'] = 'train.json'", 'error', 'there is no file',
        'annotations/instances_train2017.json'),
    'no folder': (
        "train_dataloader['dataset']['data_prefix'] = dict(img='images/')", 'error', 'image files do not exist',
        "no folder '.*images'.*train2017/"),
    "mmseg's prefix": (
        "train_dataloader['dataset']['data_prefix'] = dict(_delete_=True, img_path='train2017/')", 'error',
        "data_prefix has no 'img'", "data_prefix=dict"),
    "another file for the evaluator": (
        "val_evaluator['ann_file'] = data_root + 'annotations/instances_train2017.json'", 'error',
        'val_evaluator reads .*train2017.json', 'val_evaluator = dict'),
    'no file for the evaluator': (
        "val_evaluator['ann_file'] = 'data/own/val.json'", 'error', 'which does not exist', 'val_evaluator = dict'),
    'the same data': (
        "val_dataloader['dataset'].update(ann_file='annotations/instances_train2017.json', "
        "data_prefix=dict(img='train2017/'))\nval_evaluator['ann_file'] = data_root + "
        "'annotations/instances_train2017.json'", 'warning', '12 of 12 images for validation are for training too',
        'other images'),
    'an unknown argument': (
        "train_dataloader['dataset']['classes'] = ('circle',)", 'error', 'unexpected keyword argument', 'metainfo'),
    'an unknown type': (
        "train_dataloader['dataset']['type'] = 'MyDataset'", 'error', 'MyDataset is not in the', 'custom_imports'),
    'no image loaded': (
        "train_dataloader['dataset']['pipeline'] = [dict(type='PackDetInputs')]", 'error', 'loads no image',
        'LoadImageFromFile'),
    'a pipeline that stops': (
        "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', "
        "with_bbox=True), dict(type='Mosaic'), dict(type='PackDetInputs')]", 'error',
        'the pipeline stops', 'correct the pipeline'),
    'a model that stops': ("model = dict(backbone=dict(arch='huge'))", 'error', 'the model cannot be built', 'model'),
    'normalized twice': (
        "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', "
        "with_bbox=True, with_mask=True), dict(type='Normalize', mean=[123, 116, 103], std=[58, 57, 57]), "
        "dict(type='PackDetInputs')]", 'warning', 'mean and deviation do not fit', 'once'),
    'not normalized': (
        'model = dict(data_preprocessor=dict(mean=None, std=None))', 'warning', 'deviation do not fit', 'once'),
    'small images': (
        "train_dataloader['dataset']['filter_cfg'] = dict(min_size=500)", 'error', 'smaller than 500 pixels',
        'min_size=0'),
    'four values of mean in the pipeline': (
        "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', "
        "with_bbox=True, with_mask=True), dict(type='Normalize', mean=[9, 9, 9, 9], std=[1, 1, 1, 1]), "
        "dict(type='PackDetInputs')]", 'error', 'Normalize has 4 values of mean, .* images have 3', 'color_type'),
    'four values of mean': (
        'model = dict(data_preprocessor=dict(mean=[1, 2, 3, 4], std=[1, 1, 1, 1]))', 'error',
        'the model cannot be built', '4ch.py'),
}  # fmt: skip


@pytest.mark.parametrize('case', CONFIGS)
def test_faults_of_configs(detection, case):
    change, level, text, advice = CONFIGS[case]
    detection.expect(level, text, advice, '\n' + change, only=False)


def test_images_without_an_object(detection):
    detection.edit(
        lambda content: content.update(
            annotations=[entry for entry in content['annotations'] if entry['image_id'] not in (2, 5)]
        ),
        ('train',),
    )
    keep = "\ntrain_dataloader['dataset']['filter_cfg'] = dict(filter_empty_gt={}, min_size=0)"
    detection.expect('note', '2 of 12 images have no object .*: 000000000002.jpg, 000000000005.jpg', 'filter_empty_gt',
                     keep.format(True))  # fmt: skip
    assert detection.check(keep.format(False)) == (0, [])
    assert 'images        12, 2 without an object' in detection.printed


def test_categories_in_another_order_for_validation(detection):
    detection.edit(lambda content: content['categories'].reverse(), ('val',))
    detection.expect('error', "label 0 is 'circle' in train and 'triangle' in val", 'same order')


def test_boxes_alone_need_no_masks(detection):
    detection.edit(drop('segmentation'))
    change = (
        "\nfor loader in (train_dataloader, val_dataloader):\n    loader['dataset']['pipeline'] = "
        "[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]\n"
        "val_evaluator['metric'] = 'bbox'\ndel loader\n"
    )
    assert detection.check(change) == (0, [])


def test_missing_and_broken_images(detection):
    missing, empty, text, cut = detection.images()[:4]
    missing.unlink()
    empty.write_bytes(b'')
    text.write_text('<html>not found</html>')
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    status, found = detection.check()
    assert status == 1
    texts = ' '.join(finding[1] for finding in found)
    assert f'1 of 12 image files do not exist: {missing.name}' in texts
    assert re.search(f'images: LoadImageFromFile stops .*{empty.name}', texts)
    assert text.name in texts
    assert cut.name in texts  # some versions of OpenCV return the upper part of the image, others nothing


@pytest.mark.parametrize('ending', ['.jpg', '.png'])
def test_files_that_end_too_early(ending):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    content = cv2.imencode(ending, image)[1].tobytes()
    assert read_form(content).complete
    assert read_form(content + b'\0\0').complete
    form = read_form(content[: len(content) // 2])
    assert not form.complete
    checks = ImageChecks('train', 4, '.')
    checks.add('a/cut', form, image, None)
    findings = Findings('train')
    checks.report(findings)
    assert [(finding.level, finding.text) for finding in findings] == [
        ('warning', '1 of 4 image files end too early (the lower part is gray or missing): cut')
    ]


def turn(path, orientation):
    """Gives a photograph an EXIF orientation; its pixels stay as they are."""
    image = Image.open(path)
    image.load()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_photographs_turned_by_exif(detection):
    for path in detection.images():
        turn(path, 6)
    detection.expect('error', r'12 of 12 photographs are turned .*128 x 96 there, 96 x 128', 'color_ignore_orientation')
    change = (
        "\ntrain_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile', "
        "color_type='color_ignore_orientation'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True), "
        "dict(type='PackDetInputs')]"
    )
    status, found = detection.check(change)
    assert (status, [finding[0] for finding in found]) == (0, ['note'])


def test_upside_down_photographs_are_a_note(detection):
    turn(detection.images()[0], 3)
    detection.expect('note', '1 of 12 photographs carry an EXIF orientation', 'look at the pictures')


def rewrite(paths, change, ending='.png'):
    """Writes images anew in another format, under their names."""
    for path in paths:
        encoded = cv2.imencode(ending, change(cv2.imread(str(path))))[1]
        path.write_bytes(encoded.tobytes())


def unchanged(size=''):
    return (
        "\nfor loader in (train_dataloader, val_dataloader):\n    loader['dataset']['pipeline'] = "
        "[dict(type='LoadImageFromFile', color_type='unchanged'), dict(type='LoadAnnotations', with_bbox=True, "
        "with_mask=True), dict(type='PackDetInputs')]\ndel loader\n" + size
    )


def to_16_bits(image):
    return image.astype(np.uint16) * 16  # 12 bits of 16, as cameras give


def to_four(image):
    return np.dstack((image, image[..., :1]))


def test_gray_images_are_loaded_with_three_channels(detection):
    rewrite(detection.images() + detection.images('val'), lambda image: image[..., 0])
    assert detection.check() == (0, [])
    assert 'files         12 PNG of 1 channel of 8 bits' in detection.printed
    assert 'loaded        12 of 3 x uint8' in detection.printed


def test_gray_images_as_they_are(detection):
    rewrite(detection.images() + detection.images('val'), lambda image: image[..., 0])
    detection.expect('error', 'the data preprocessor stops at an image of 1 channels', 'mean and std', unchanged())
    detection.expect(
        'error', 'the network gets 1 channels and takes 3', 'in_channels=1',
        unchanged('model = dict(data_preprocessor=dict(mean=[110], std=[58], bgr_to_rgb=False))'),
    )  # fmt: skip


def test_gray_and_colour_images_as_they_are(detection):
    rewrite(detection.images()[:3], lambda image: image[..., 0])
    detection.expect('error', 'different numbers of channels .* 9 images of 3 x uint8, 3 images of 1 x uint8', 'color',
                     unchanged(), only=False)  # fmt: skip


def test_images_of_16_bits(detection):
    rewrite(detection.images() + detection.images('val'), to_16_bits)
    detection.expect('warning', r'12 of 12 images have 16 bits .* the largest value is 1\d', 'unchanged')
    detection.expect('warning', 'mean and deviation do not fit', 'mean and std of these images')
    detection.expect('warning', 'mean and deviation do not fit .* to 4080', 'mean and std of these images', unchanged())


def test_images_of_four_channels(detection):
    rewrite(detection.images() + detection.images('val'), to_four)
    detection.expect('note', '12 of 12 images have a fourth channel, which is left out', '4ch.py')
    lost = 'the network gets 3 channels and takes 4 .the pipeline returns 4, the data preprocessor makes 3'
    detection.expect('error', lost, 'in_channels',
                     unchanged("model = dict(backbone=dict(in_channels=4), data_preprocessor=dict(mean=[1], std=[9]))"),
                     )  # fmt: skip
    status, found = detection.check(
        unchanged(
            'model = dict(backbone=dict(in_channels=4), data_preprocessor=dict(mean=[110], std=[58], bgr_to_rgb=False))'
        )
    )
    assert (status, found) == (0, [])
    assert 'network gets  4 channels' in detection.printed


def test_opaque_fourth_channels_are_no_finding(detection):
    rewrite(detection.images(), lambda image: np.dstack((image, np.full(image.shape[:2], 255, np.uint8))))
    assert detection.check() == (0, [])


WRAPPERS = {
    'RepeatDataset': "dict(_delete_=True, type='RepeatDataset', times=2, dataset=inner)",
    'ConcatDataset': "dict(_delete_=True, type='ConcatDataset', datasets=[inner, inner])",
    'ClassBalancedDataset': "dict(_delete_=True, type='ClassBalancedDataset', oversample_thr=0.5, dataset=inner)",
    'MultiImageMixDataset': "dict(_delete_=True, type='MultiImageMixDataset', dataset=loading, "
    "pipeline=[dict(type='Mosaic', img_scale=(96, 128)), dict(type='PackDetInputs')])",
    'nested': "dict(_delete_=True, type='RepeatDataset', times=2, "
    "dataset=dict(type='ConcatDataset', datasets=[inner, inner]))",
}
INNER = """
metainfo = dict(classes=('circle', 'square', 'triangle'))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
common = dict(type='CocoDataset', data_root=data_root, ann_file='annotations/instances_train2017.json',
              data_prefix=dict(img='train2017/'), metainfo=metainfo, serialize_data=False)
inner = dict(common, pipeline=[*load, dict(type='PackDetInputs')])
loading = dict(common, pipeline=load)
train_dataloader['dataset'] = {}
"""


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrappers(detection, wrapper):
    change = INNER.format(WRAPPERS[wrapper])
    if wrapper == 'MultiImageMixDataset':
        change = change.replace('with_mask=True', 'with_mask=False')
    status, found = detection.check(change)
    assert (status, found) == (0, [])
    detection.edit(set_to('iscrowd', 1), ('train',))
    detection.expect('error', r'train.*: all \d+ annotations are marked iscrowd', 'iscrowd', change)


def test_data_sets_of_a_wrapper_that_differ(detection):
    change = INNER.format(
        "dict(_delete_=True, type='ConcatDataset', datasets=[inner, dict(inner, metainfo=dict(classes=('circle', "
        "'square')))])"
    )
    detection.expect('error', 'train 2 has other classes than train 1', 'same metainfo', change, only=False)


def with_palette(labels, colours=((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))):
    image = Image.fromarray(labels)
    image.putpalette([value for colour in colours for value in colour])
    return image


def test_palette_files_hold_class_numbers(segmentation):
    segmentation.edit(with_palette)
    assert segmentation.check() == (0, [])


MASKS = {
    '0 and 255': (
        lambda labels: (labels > 0).astype(np.uint8) * 255, 'error', 'hold 0, 255 alone', 'write 1 in place of 255'),
    'gray levels': (lambda labels: labels * 50, 'error', 'numbers 50, 100, 150 are left', 'gray levels'),
    'one too many': (lambda labels: labels + 1, 'error', 'numbers 4 are left, but there are 4 classes', 'reduce_zero'),
    'colours': (
        lambda labels: np.array(with_palette(labels).convert('RGB')), 'error', 'label maps are colour images',
        'PNG file of class numbers'),
    'gray as colours': (lambda labels: np.dstack([labels] * 3), 'error', 'whose channels are the same', 'one channel'),
    'gray with opacity': (
        lambda labels: Image.fromarray(labels).convert('LA'), 'error', 'whose channels are the same', 'one channel'),
    'with opacity': (
        lambda labels: np.array(with_palette(labels).convert('RGBA')), 'error', 'label maps are colour images', 'PNG'),
    '16 bits': (
        lambda labels: labels.astype(np.uint16) * 300, 'error', r'outside of 0 to 255 \(0 to [69]00\)', '8 bits'),
    'empty': (lambda labels: labels * 0, 'error', "of 4 classes only 'background' occurs", 'look at the'),
    'ignored': (lambda labels: labels * 0 + 255, 'error', 'hold 255 alone', '255'),
    'without a class': (
        lambda labels: np.where(labels == 3, 0, labels), 'warning', "1 of 4 classes never occur: 'triangle'", 'add'),
    'another size': (lambda labels: labels[:50], 'error', r'another size than their image .128 x 50', 'size'),
    'interpolated': (
        lambda labels: cv2.resize(cv2.resize(labels * 60, (64, 48)), (128, 96)) // 10, 'error', 'are left, but', ''),
}  # fmt: skip


@pytest.mark.parametrize('case', MASKS)
def test_faults_of_label_maps(segmentation, case):
    change, level, text, advice = MASKS[case]
    segmentation.edit(change)
    segmentation.expect(level, text, advice, only=False)


def test_palette_files_need_pillow(segmentation):
    segmentation.edit(with_palette)
    change = (
        "\nfor loader in (train_dataloader, val_dataloader):\n    loader['dataset']['pipeline'] = "
        "[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', imdecode_backend='cv2'), "
        "dict(type='PackSegInputs')]\ndel loader\n"
    )
    segmentation.expect('error', 'label maps are colour images', "imdecode_backend='pillow'", change)


def test_binary_masks(segmentation):
    change = (
        "\nclasses = ('background', 'object')\nmodel = dict(decode_head=dict(num_classes=2), "
        'auxiliary_head=dict(num_classes=2))\nfor loader in (train_dataloader, val_dataloader):\n'
        "    loader['dataset']['metainfo'] = dict(classes=classes)\ndel loader\n"
    )
    segmentation.edit(lambda labels: (labels > 0).astype(np.uint8))
    assert segmentation.check(change) == (0, [])
    segmentation.edit(lambda labels: Image.fromarray(labels * 255).convert('1'))  # one bit is read as 0 and 1
    assert segmentation.check(change) == (0, [])
    segmentation.edit(lambda labels: labels.astype(np.uint8) * 255)
    segmentation.expect('error', 'hold 0, 255 alone', 'write 1 in place of 255', change)


def reduce(names="('background', 'circle', 'square', 'triangle')", count=4):
    return (
        f'\nfor loader in (train_dataloader, val_dataloader):\n    loader["dataset"].update(reduce_zero_label=True, '
        f'metainfo=dict(classes={names}))\ndel loader\n'
        f'model = dict(decode_head=dict(num_classes={count}), auxiliary_head=dict(num_classes={count}))\n'
    )


def test_reduce_zero_label_that_drops_a_class(segmentation):
    segmentation.expect('error', "0 to 3 for 4 classes: 'background' is dropped", 'reduce_zero_label=False', reduce())
    five = reduce("('background', 'circle', 'square', 'triangle', 'star')", 5)
    segmentation.expect('error', "makes number 1 the class 'background'", 'out of the classes', five)
    assert segmentation.check(reduce("('circle', 'square', 'triangle')", 3)) == (0, [])


def test_reduce_zero_label_of_the_loader_alone(segmentation):
    change = (
        "\ntrain_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', "
        "reduce_zero_label=True), dict(type='PackSegInputs')]"
    )
    segmentation.expect('error', 'LoadAnnotations stops', 'the same reduce_zero_label', change)


FOLDERS = {
    'another ending': (
        "train_dataloader['dataset']['img_suffix'] = '.png'", "no file in .* ends in '.png': 12 files end in '.jpg'",
        "img_suffix='.jpg'"),
    'another ending of masks': (
        "train_dataloader['dataset']['seg_map_suffix'] = '_mask.png'", '12 of 12 images have no label map',
        "seg_map_suffix='.png'"),
    'no folder': (
        "train_dataloader['dataset']['data_prefix'] = dict(img_path='photos/')", "there is no folder '.*photos",
        'holds images/, masks/'),
    "mmdet's prefix": (
        "train_dataloader['dataset']['data_prefix'] = dict(_delete_=True, img='images/train')",
        "data_prefix has no 'img_path', but 'img'", 'img_path='),
    'no list': ("train_dataloader['dataset']['ann_file'] = 'train.txt'", 'there is no file .*train.txt', 'ann_file'),
    'no classes': ("train_dataloader['dataset']['metainfo'] = None", 'has no classes', 'metainfo'),
    'a string': (
        "train_dataloader['dataset']['metainfo'] = dict(classes=('circle'))", "classes is the text 'circle'", 'comma'),
    'a palette of another length': (
        "train_dataloader['dataset']['metainfo'] = dict(palette=[(1, 2, 3)])", 'palette has 1 colours for 4', 'colour'),
    "ADE20K's type": (
        "train_dataloader['dataset']['type'] = 'ADE20KDataset'", 'is not a subset of', 'BaseSegDataset'),
    'heads': ('model = dict(decode_head=dict(num_classes=150))', 'decode_head.* has num_classes=150', 'num_classes=4'),
    'weights of classes': (
        'model = dict(decode_head=dict(loss_decode=dict(class_weight=[1.0] * 19)))', 'class_weight of 19 values',
        'class_weight'),
    'a wrapper that knows no classes': (
        "inner = dict(type='BaseSegDataset', data_root=data_root, data_prefix=dict(img_path='images/train', "
        "seg_map_path='masks/train'), metainfo=dict(classes=('background', 'circle', 'square', 'triangle')), "
        "pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])\n"
        "train_dataloader['dataset'] = dict(_delete_=True, type='ClassBalancedDataset', oversample_thr=0.5, "
        'dataset=inner)', 'ClassBalancedDataset stops: NotImplementedError', 'leave it out'),
}  # fmt: skip


@pytest.mark.parametrize('case', FOLDERS)
def test_faults_of_segmentation_configs(segmentation, case):
    change, text, advice = FOLDERS[case]
    segmentation.expect('error', text, advice, '\n' + change, only=False)


def test_some_images_of_another_ending(segmentation):
    for path in segmentation.images()[:3]:
        path.rename(path.with_suffix('.JPG'))
    segmentation.expect('warning', "3 images are not read, since they do not end in '.jpg' but in '.JPG'", 'one ending')
    segmentation.expect('note', '3 label maps have no image', 'add their images')


def test_lists_with_endings(segmentation):
    (segmentation.folder / 'train.txt').write_text('\n'.join(path.name for path in segmentation.images()))
    change = "\ntrain_dataloader['dataset']['ann_file'] = 'train.txt'"
    segmentation.expect('error', '12 of 12 image files do not exist', 'have no ending', change)


def test_turned_photographs_beside_masks(segmentation):
    for path in segmentation.images():
        turn(path, 8)
    segmentation.expect('error', 'turned by the loader, .* label maps are not', 'color_ignore_orientation')


def test_masks_as_jpeg(segmentation):
    for path in segmentation.masks():
        Image.open(path).save(path.with_suffix('.jpg'), quality=60)
        path.unlink()
    change = "\ntrain_dataloader['dataset']['seg_map_suffix'] = '.jpg'"
    segmentation.expect('error', 'label maps hold .* are left', 'JPEG changes the numbers', change)


def test_page_in_a_browser(detection):
    detection.edit(lambda content: content['categories'][0].update(name='circle <b>é</b> 圆'))
    change = (
        "\nfor loader in (train_dataloader, val_dataloader):\n    loader['dataset']['metainfo'] = "
        "dict(classes=('circle <b>é</b> 圆', 'square', 'triangle'))\ndel loader\n"
    )
    detection.edit(first(bbox=[100, 5, 60, 20]), ('train',))
    detection.check(change)
    with browser_page(detection.page) as (page, complaints, asked):
        images = page.locator('svg image').count()
        boxes = page.locator('svg rect').count()
        widths = page.evaluate('[...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width)')
        headings = page.locator('h2').all_inner_texts()
        names = set(page.locator('svg text').all_text_contents())
        rows = page.locator('table').first.locator('tr').count()
        page.set_viewport_size({'width': 500, 'height': 900})
        narrow = page.evaluate('[...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().right)')
    assert complaints == []
    assert [url for url in asked if not url.startswith('data:')] == [detection.page.as_uri()]
    assert headings == ['Findings', 'train', 'val']
    assert images == 8
    assert boxes >= 4
    assert min(widths) > 300
    assert max(narrow) <= 500
    assert names <= {'circle <b>é</b> 圆', 'square', 'triangle'}
    assert rows >= 2


def test_configs_whose_types_are_classes(detection):
    text = detection.base.read_text().replace('data/shapes/coco/', f'{detection.folder}/')
    for name in ('CocoDataset', 'LoadImageFromFile', 'CocoMetric'):
        text = text.replace(f"'{name}'", name)
    imports = 'from mmcv.transforms import LoadImageFromFile\nfrom mmdet.datasets import CocoDataset\n'
    detection.config = (
        (imports + 'from mmdet.evaluation import CocoMetric\n' + text).replace('{', '{{').replace('}', '}}')
    )
    assert detection.check() == (0, [])
    assert 'data set      CocoDataset' in detection.printed
    detection.edit(drop('iscrowd'), ('val',))
    detection.expect('error', "val: .* have no 'iscrowd'", "'iscrowd': 0")


def test_bad_arguments(detection, monkeypatch, capsys):
    classifier = ROOT / 'configs' / 'cls_sm_t.py'
    for arguments, message in (
        (('nowhere.py',), 'expected a config file, found no such file'),
        ((detection.base, '--images', 0), 'got 8 and 0'),
        ((ROOT / 'configs' / '_base_' / 'no_decay.py',), 'expected a config with the key model, found no_decay'),
        ((classifier,), "expected a config of mmdet or mmseg, found default_scope 'mmpretrain'"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_tool(check_dataset, *arguments, monkeypatch=monkeypatch)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_part_of_the_images(detection):
    status, found = detection.check('', '--images', 3)
    assert (status, found) == (0, [])
    assert 'train: reading 3 of 12 images' in detection.printed


@pytest.mark.parametrize('name', ['finetune_mask_rcnn_sm_t', 'finetune_mask_rcnn_sm_t_4ch', 'quickstart_mask_rcnn'])
def test_detectors_for_own_data_check_their_classes(name):
    from mmengine.registry import HOOKS, init_default_scope

    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    init_default_scope('mmengine')
    assert type(HOOKS.build(config.default_hooks.num_classes)).__name__ == 'NumClassCheckHook'
