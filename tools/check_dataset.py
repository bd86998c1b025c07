"""Checks the data that a config of MMDetection or MMSegmentation would train on, before anything is trained.

Example:
    python tools/check_dataset.py my_detector.py --out work_dirs/check_dataset.html

Training and validation data are read through the toolbox's own data sets, every image and annotation by the loading
steps of the config's pipeline. A table says what is there; each finding has a line of advice:

    error    training or validation stops, or learns something else than what was labelled
    warning  part of the data is left out or wrong
    note     worth to know

The page shows some images, those of the findings first, with what the loader and the whole pipeline made of them. It
holds its pictures and needs no network. Exits with 1 if there is an error, with 2 on bad arguments, else with 0.
"""

import argparse
import base64
import contextlib
import datetime
import filecmp
import hashlib
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from jinja2 import Environment
from mmengine import fileio
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.utils import track_iter_progress
from torch import nn

import mmspatialmamba  # noqa: F401, registers the backbone
from mmspatialmamba.dataset_checks import (
    ERROR,
    NOTE,
    WARNING,
    FileForm,
    Finding,
    Findings,
    ImageChecks,
    LabelMapChecks,
    check_classes,
    check_coco,
    check_folders,
    check_network_input,
    find_annotations,
    listed,
    read_coco,
    read_form,
)

TOOLBOXES = ('mmdet', 'mmseg')
PRINTED_CLASSES = 30
"""Classes that are listed in the terminal; the page lists all."""

PICTURE_SIDE = 440
"""Longer side of a picture on the page, in pixels."""

COLOURS = ((230, 25, 75), (60, 180, 75), (0, 110, 220), (245, 130, 48), (145, 30, 180), (0, 170, 170), (240, 50, 230),
           (128, 128, 0), (170, 110, 40), (128, 0, 0), (0, 128, 128), (0, 0, 128))  # fmt: skip
"""Red, green, blue of the classes on the page; a later class has the colour of an earlier one."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.7em; text-align: right; }
th:first-child, td:first-child, .text th, .text td { text-align: left; vertical-align: top; }
.error { color: #b00020; } .warning { color: #a65f00; } .note { color: #345; }
figure { margin: 1.5em 0; display: grid; grid-template-columns: 1fr 1fr; gap: 0.5em 1em; }
figcaption { grid-column: 1 / 3; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; background: #eee; }
svg text { font: 13px sans-serif; paint-order: stroke; stroke: #000; stroke-width: 3px; fill: #fff; }
svg rect { fill: none; stroke-width: 2; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Written {{ date }}.</p>
<h2>Findings</h2>
{% if findings %}
<table class="text">
<tr><th>level</th><th>data</th><th>finding</th><th>advice</th></tr>
{% for finding in findings %}
<tr><td class="{{ finding.level }}">{{ finding.level }}</td><td>{{ finding.source }}</td><td>{{ finding.text }}</td>
<td>{{ finding.advice }}</td></tr>
{% endfor %}
</table>
{% else %}
<p>None.</p>
{% endif %}
{% for part in parts %}
<h2>{{ part.source }}</h2>
<table class="text">
{% for name, value in part.facts.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% if part.rows %}
<table>
<tr>{% for name in part.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in part.rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% for picture in part.pictures %}
<figure>
<figcaption>{{ picture.caption }}. Left: as loaded; right: as the pipeline returns it.</figcaption>
{% for view in picture.views %}
{% if view %}
<svg viewBox="0 0 {{ view.width }} {{ view.height }}" role="img">
<image href="data:image/jpeg;base64,{{ view.data }}" width="{{ view.width }}" height="{{ view.height }}"/>
{% for box in view.boxes %}
<rect x="{{ box.x }}" y="{{ box.y }}" width="{{ box.w }}" height="{{ box.h }}" stroke="{{ box.colour }}"
{%- if box.ignored %} stroke-dasharray="4 4"{% endif %}/>
<text x="{{ box.x + 3 }}" y="{{ box.y + 14 }}">{{ box.name }}</text>
{% endfor %}
</svg>
{% else %}
<div></div>
{% endif %}
{% endfor %}
</figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""


@dataclass
class View:
    """One picture: a JPEG in base64 and the boxes over it."""

    data: str
    width: int
    height: int
    boxes: list[dict]


@dataclass
class Picture:
    """An image as loaded and as the pipeline returns it; None where there is none."""

    caption: str
    views: tuple[View | None, View | None]


@dataclass
class Part:
    """What was read of one data set.

    Attributes:
        source: 'train' or 'val', with the number of the data set where there are several.
        facts: Names and values of the overview.
        columns: Head of the table of classes.
        rows: The table of classes.
        pictures: Some images.
        hashes: For each image's pixels, its path.
        labels: Names of the labels 0, 1, … by the file of annotations; None where the file does not say.
        classes: Classes of the data set, None if they are wrong in themselves.
        ann_file: File of annotations in COCO's format, None if there is none.
    """

    source: str
    facts: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: list[tuple] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    hashes: dict[bytes, str] = field(default_factory=dict)
    labels: list[str] | None = None
    classes: list[str] | None = None
    ann_file: str | None = None


class DatasetCheck:
    """Reads the data of a config, one data set after the other.

    Args:
        config: Config of MMDetection or MMSegmentation.
        limit: Number of images to read of each data set, None for all.
        pictures: Number of images to draw of each data set.
    """

    def __init__(self, config: Config, limit: int | None, pictures: int):
        self.config, self.limit, self.number_of_pictures = config, limit, pictures
        self.parts: list[Part] = []
        self.findings: list[Finding] = []
        init_default_scope(config.get('default_scope') or 'mmengine')
        self.model = self._build_model()

    def run(self) -> None:
        """Reads everything."""
        for split in ('train', 'val'):
            loader = self.config.get(f'{split}_dataloader')
            if loader is not None:
                self._read(loader['dataset'], split, split == 'train')
        self._compare()

    def _build_model(self) -> nn.Module | None:
        findings = Findings('model')
        try:
            model = revert_sync_batchnorm(MODELS.build(self.config.model))
        except Exception as error:
            reason = _first_line(error)
            advice = 'correct the model in the config'
            if 'mean' in reason or 'std' in reason:
                advice = (
                    'data_preprocessor takes 1 or 3 values: normalize in the pipeline, as '
                    'configs/finetune_mask_rcnn_sm_t_4ch.py does'
                )
            findings.add(ERROR, f'the model cannot be built: {reason}', advice)
            self.findings += findings
            return None
        return model

    def _read(self, config: dict, source: str, training: bool) -> None:
        """Reads a data set, or all of those that a wrapper holds."""
        leaves = list(_leaves(config, source))
        findings = Findings(source)
        before = len(self.findings)
        for leaf, name in leaves:
            self._read_leaf(leaf, name, training)
        if leaves[0][0] is config or any(finding.level == ERROR for finding in self.findings[before:]):
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                wrapper = DATASETS.build(config)
                wrapper.full_init()
            if isinstance(wrapper.metainfo, list):
                findings.add(
                    ERROR,
                    f'the data sets of {_type_name(config)} differ in classes or palette',
                    'give all of them the same metainfo',
                )
            if hasattr(wrapper, 'pipeline'):
                items = [wrapper[index] for index in _spread(len(wrapper), self.number_of_pictures)]
                self.parts.append(Part(source, {'data set': _type_name(config), 'images': str(len(wrapper))}))
                self._check_input(items, findings, self.parts[-1], training)
        except Exception as error:
            advice = 'correct the data set in the config'
            if isinstance(error, NotImplementedError):
                advice = "this wrapper needs a data set that knows each image's classes: leave it out"
            findings.add(ERROR, f'{_type_name(config)} stops: {_first_line(error)}', advice)
        self.findings += findings

    def _read_leaf(self, config: dict, source: str, training: bool) -> None:
        """Reads one data set."""
        part, findings = Part(source), Findings(source)
        self.parts.append(part)
        metainfo = config.get('metainfo') or {}
        segmentation = self.config.get('default_scope') == 'mmseg'
        part.facts['data set'] = _type_name(config)
        try:
            dataset = DATASETS.build({**config, 'lazy_init': True})
        except Exception as error:
            if metainfo.get('classes') is not None:
                check_classes(findings, metainfo['classes'], metainfo, ERROR if segmentation else WARNING)
            if not findings.has_error:
                findings.add(ERROR, f'the data set cannot be built: {_first_line(error)}', _advise_build(error))
            self.findings += findings
            return
        classes = dataset.metainfo.get('classes')
        check_classes(findings, classes, metainfo, ERROR if segmentation else WARNING)
        part.classes = None if findings.has_error else list(classes)
        content, skipped = None, set()
        if _is_coco(dataset):
            part.ann_file = dataset.ann_file
            content, skipped = self._check_annotations(dataset, findings, part, 'classes' in metainfo, training)
        elif hasattr(dataset, 'img_suffix'):
            check_folders(dataset, findings)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                dataset.full_init()
        except Exception as error:
            if not findings.has_error:
                findings.add(ERROR, f'the data set cannot be read: {_first_line(error)}', _advise_build(error))
            self.findings += findings
            return
        if content is not None:
            if part.classes is not None:
                _check_left_out(content, dataset, findings)
            part.labels = [entry['name'] for entry in content['categories'] if entry['id'] in dataset.cat_ids]
        if len(dataset) == 0:
            if not findings.has_error:
                findings.add(ERROR, 'the data set has no images', 'correct data_root and data_prefix')
        else:
            self._read_images(dataset, findings, part, training, skipped)
        self.findings += findings

    def _check_annotations(
        self, dataset: object, findings: Findings, part: Part, own_classes: bool, training: bool
    ) -> tuple[dict | None, set]:
        """Checks a file in COCO's format; returns its content if it can be read, and images not to be loaded."""
        path = Path(dataset.ann_file)
        if '://' in dataset.ann_file:
            return None, set()  # a remote file: the toolbox alone reads it
        if not path.is_file():
            findings.add(ERROR, f'there is no file {str(path)!r}', find_annotations(path, dataset.data_root))
            return None, set()
        content = read_coco(path, findings)
        if content is None:
            return None, set()
        metrics = [] if training else [evaluator.get('metric', []) for evaluator in self._evaluators()]
        masks = 'segm' in str(metrics) or any(getattr(step, 'with_mask', False) for step in dataset.pipeline.transforms)
        skipped = check_coco(content, findings, part.classes, own_classes, masks, evaluated=bool(metrics))
        folder = dataset.data_prefix.get('img')
        if folder is None:
            findings.add(
                ERROR, f"data_prefix has no 'img', but {listed(dataset.data_prefix)}", "data_prefix=dict(img='images/')"
            )
        return content, skipped

    def _evaluators(self) -> list[dict]:
        """Returns the evaluators of the validation that read a file in COCO's format."""
        evaluators = self.config.get('val_evaluator') or []
        evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
        return [evaluator for evaluator in evaluators if 'Coco' in _type_name(evaluator)]

    def _read_images(self, dataset: object, findings: Findings, part: Part, training: bool, skipped: set) -> None:
        """Reads images and annotations by the loading steps of the pipeline, but those of the ids ``skipped``."""
        indices = _spread(len(dataset), self.limit or len(dataset))
        if skipped:
            indices = [index for index in indices if dataset.get_data_info(index)['img_id'] not in skipped]
        images = ImageChecks(part.source, len(indices), _folder(dataset))
        maps = None
        if hasattr(dataset, 'img_suffix'):
            maps = LabelMapChecks(
                part.source, len(indices), part.classes, dataset.reduce_zero_label, self._ignore_index(),
                dataset.seg_map_suffix, _folder(dataset),
            )  # fmt: skip
        loaders = [step for step in dataset.pipeline.transforms if type(step).__name__.startswith('Load')]
        if not any('Image' in type(step).__name__ for step in loaders):
            findings.add(ERROR, 'the pipeline loads no image', "begin it with dict(type='LoadImageFromFile')")
            return
        part.facts['images'] = str(len(dataset))
        print(f'{part.source}: reading {len(indices)} of {len(dataset)} images', flush=True)
        usable = []
        for index in track_iter_progress(indices):
            if self._read_image(dataset.get_data_info(index), dataset, loaders, images, maps, part):
                usable.append(index)
        print(flush=True)
        images.report(findings)
        if maps is not None:
            maps.report(findings, training)
            part.columns, part.rows = ('class', 'label maps', 'pixels'), maps.table()
        elif 'instances' in dataset.get_data_info(0):
            _count_objects(dataset, findings, part, training)
        part.facts['files'] = listed(f'{count} {form}' for form, count in images.forms.most_common())
        part.facts['loaded'] = listed(f'{count} of {form}' for form, count in images.loaded.most_common())
        self._draw(dataset, loaders, usable, findings, part, training)

    def _read_image(
        self, info: dict, dataset: object, loaders: list, images: ImageChecks, maps: LabelMapChecks | None, part: Part
    ) -> bool:
        """Reads an image and its annotations; returns whether they can be read."""
        path, backend = info['img_path'], getattr(dataset, 'backend_args', None)
        if not fileio.exists(path, backend_args=backend):
            images.add_missing(path)
            return False
        stated = (info['height'], info['width']) if 'height' in info else None
        label_map, read = info.get('seg_map_path'), False
        form = None
        for step in loaders:
            if form is not None and label_map and not fileio.exists(label_map, backend_args=backend):
                if maps is not None:
                    maps.add_missing(label_map)
                else:
                    images.add_missing(label_map)
                return False
            try:
                info = step(info)
                if info is None:
                    raise ValueError('it returned nothing, so that another image is taken')
            except Exception as error:
                images.add_failure(path, type(step).__name__, error)
                return False
            if form is None and 'img' in info:
                form = _form(fileio.get(path, backend_args=backend), info['img'])
                images.add(path, form, info['img'], stated)
                part.hashes.setdefault(
                    hashlib.blake2b(np.ascontiguousarray(info['img']), digest_size=16).digest(), path
                )
            if maps is not None and 'gt_seg_map' in info and not read:
                read = True
                content = fileio.get(label_map, backend_args=backend)
                raw = mmcv.imfrombytes(content, flag='unchanged', backend=step.imdecode_backend).squeeze()
                maps.add(label_map, raw, info['gt_seg_map'], info['img'].shape[:2], form.orientation)
        return True

    def _ignore_index(self) -> int:
        """Returns the label that the loss ignores."""
        heads = getattr(self.model, 'decode_head', None)
        head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        return getattr(head, 'ignore_index', 255)

    def _draw(
        self, dataset: object, loaders: list, usable: list[int], findings: Findings, part: Part, training: bool
    ) -> None:
        """Draws some images, those of the findings first, and checks what the network gets of them."""
        wanted = {Path(path).name for finding in findings for path in finding.images}
        shown = [
            index
            for index in usable
            if wanted and Path(dataset.get_data_info(index)['img_path']).name in wanted
        ]  # fmt: skip
        shown = shown[: self.number_of_pictures // 2]
        rest = [index for index in usable if index not in set(shown)]
        shown += [rest[place] for place in _spread(len(rest), self.number_of_pictures - len(shown))]
        names = part.classes or []
        if not self._check_normalize(dataset, shown, loaders, findings):
            return
        items = []
        for index in shown:
            info = dataset.get_data_info(index)
            caption = info['img_path']
            for step in loaders:
                info = step(info)
            left, right = _draw_loaded(info, names), None
            try:
                item = dataset.pipeline(dataset.get_data_info(index))
            except Exception as error:
                findings.add(
                    ERROR,
                    f'the pipeline stops at {Path(caption).name}: {_first_line(error)}',
                    'correct the pipeline in the config, or leave this image out',
                )
                break
            if item is not None and isinstance(item.get('inputs'), torch.Tensor):
                items.append(item)
                right = _draw_packed(item, names)
            part.pictures.append(Picture(caption, (left, right)))
        if items:
            self._check_input(items, findings, part, training)

    def _check_normalize(self, dataset: object, shown: list[int], loaders: list, findings: Findings) -> bool:
        """Compares an image's channels with the values of a transform that normalizes; returns whether they fit."""
        for index in shown[:1]:
            info = dataset.get_data_info(index)
            for step in loaders:
                info = step(info)
            channels = info['img'].shape[2] if info['img'].ndim == 3 else 1
            for step in dataset.pipeline.transforms:
                count = np.size(getattr(step, 'mean', None) if getattr(step, 'mean', None) is not None else 0)
                if count not in (1, channels):
                    findings.add(
                        ERROR,
                        f'{type(step).__name__} has {count} values of mean, the loaded images have {channels} channels',
                        'give mean and std one value for each channel, or load as many channels (color_type of '
                        'LoadImageFromFile)',
                    )
                    return False
        return True

    def _check_input(self, items: list[dict], findings: Findings, part: Part, training: bool) -> None:
        """Checks what the network gets of some images, after its data preprocessor."""
        if self.model is None:
            return
        images, normalized = [], []
        for item in items:
            images.append(item['inputs'].numpy())
            batch = {'inputs': [item['inputs']], 'data_samples': [item['data_samples'].clone()]}
            try:
                with torch.no_grad():
                    inputs = self.model.data_preprocessor(batch, training)['inputs']
            except Exception as error:
                findings.add(
                    ERROR,
                    f'the data preprocessor stops at an image of {item["inputs"].shape[0]} channels: '
                    + _first_line(error),
                    'give mean and std one value for each channel; for four channels normalize in the pipeline, as '
                    'configs/finetune_mask_rcnn_sm_t_4ch.py does',
                )
                return
            height, width = item['inputs'].shape[1:]
            normalized.append(inputs[0, :, :height, :width].numpy())
        backbone = getattr(self.model, 'backbone', nn.Identity())
        first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
        expected = None if first is None else first.in_channels
        part.facts['network gets'] = check_network_input(findings, images, normalized, expected)

    def _check_heads(self, classes: list[str]) -> None:
        """Compares the heads' numbers of classes with the data set's, as MMDetection's NumClassCheckHook does."""
        if self.model is None:
            return
        count, findings = len(classes), Findings('model')
        found = defaultdict(list)
        for name, module in self.model.named_modules():
            number = getattr(module, 'num_classes', None)
            skipped = name.endswith('rpn_head') or name.startswith('backbone') or 'Semantic' in type(module).__name__
            if isinstance(number, int) and not skipped and number != count:
                found[f'num_classes={number}'].append(name)
            weights = getattr(module, 'class_weight', None)
            if isinstance(weights, (list, tuple)) and len(weights) not in (count, count + 1):
                found[f'class_weight of {len(weights)} values'].append(name)
        for what, names in found.items():
            findings.add(
                ERROR,
                f'{listed(names)} of the model has {what}, the data set has {count} classes',
                f'set num_classes={count} in every head, and class_weight for as many'
                if 'weight' in what
                else f'set num_classes={count} in every head',
            )
        self.findings += findings

    def _compare(self) -> None:
        """Compares validation with training."""
        train = [part for part in self.parts if part.source.startswith('train')]
        val = [part for part in self.parts if part.source.startswith('val')]
        findings = Findings('val')
        first = next((part for part in train if part.classes is not None), None)
        if first is not None:
            self._check_heads(first.classes)
        for part in [*train, *val]:
            if first is None or part.classes is None or part is first:
                continue
            if part.classes != first.classes:
                findings.add(
                    ERROR,
                    f'{part.source} has other classes than {first.source}: {listed(part.classes)} and '
                    f'{listed(first.classes)}',
                    'give all data sets the same metainfo (a config that inherits another one has to set each)',
                )
            elif part.labels and first.labels and part.labels != first.labels and len(part.labels) == len(first.labels):
                index = next(i for i, name in enumerate(first.labels) if part.labels[i] != name)
                findings.add(
                    ERROR,
                    f'label {index} is {first.labels[index]!r} in {first.source} and {part.labels[index]!r} in '
                    f'{part.source}: the categories of their files are in another order',
                    'write the same categories in the same order into all files',
                )
        for evaluator in self._evaluators():
            if evaluator.get('ann_file') and len(val) == 1 and val[0].ann_file:
                _check_evaluator(evaluator['ann_file'], val[0].ann_file, findings)
        hashes = {key: path for part in train for key, path in part.hashes.items()}
        seen = {path: hashes[key] for part in val for key, path in part.hashes.items() if key in hashes}
        if seen:
            total = sum(len(part.hashes) for part in val)
            findings.add(
                WARNING,
                f'{len(seen)} of {total} images for validation are for training too: '
                + listed(Path(path).name for path in seen),
                'validate on other images: these figures say nothing about images that were not trained on',
                seen,
            )
        self.findings += findings


def _leaves(config: dict, source: str) -> Iterator[tuple[dict, str]]:
    """Yields the data sets in a wrapper such as ConcatDataset, or the data set itself, with their names."""
    if isinstance(config.get('dataset'), dict):
        yield from _leaves(config['dataset'], source)
    elif isinstance(config.get('datasets'), (list, tuple)):
        for number, inner in enumerate(config['datasets'], 1):
            yield from _leaves(inner, f'{source} {number}')
    else:
        yield config, source


def _type_name(config: dict) -> str:
    kind = config.get('type')
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _first_line(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def _advise_build(error: Exception) -> str:
    """Returns advice for what a toolbox raised when it built or read a data set."""
    reason = str(error)
    if 'is not a subset of' in reason:
        return "this type has classes of its own: take type='BaseSegDataset' (mmdet: 'CocoDataset') for your own"
    if 'unexpected keyword argument' in reason:
        return 'leave this argument out; classes go into metainfo=dict(classes=…)'
    if 'is not in the' in reason and 'registry' in reason:
        return 'correct the type, or add the package that registers it to custom_imports'
    return 'correct the data set in the config'


def _is_coco(dataset: object) -> bool:
    """Returns whether a data set reads COCO's format of objects (not LVIS' or the panoptic one)."""
    return getattr(getattr(dataset, 'COCOAPI', None), '__name__', '') == 'COCO'


def _folder(dataset: object) -> str:
    return str(dataset.data_root or next(iter(dataset.data_prefix.values()), '') or '.')


def _spread(total: int, count: int) -> list[int]:
    """Returns up to ``count`` indices below ``total``, evenly spaced."""
    return [] if count < 1 else sorted({round(place) for place in np.linspace(0, total - 1, min(total, count))})


def _form(content: bytes, image: np.ndarray) -> FileForm:
    """Returns what is in an image file; of a format that only the pipeline reads, what it made of it."""
    try:
        return read_form(content)
    except ValueError:
        channels = image.shape[2] if image.ndim == 3 else 1
        return FileForm('unknown format', channels, image.dtype.itemsize * 8, 1, True, False)


def _check_left_out(content: dict, dataset: object, findings: Findings) -> None:
    """Adds findings about images that the data set's filter leaves out."""
    if dataset.test_mode or dataset._indices is not None:
        return
    kept = {dataset.get_data_info(index)['img_id'] for index in range(len(dataset))}
    left_out = [image for image in content['images'] if image['id'] not in kept]
    smallest = (dataset.filter_cfg or {}).get('min_size', 0)
    small = [image for image in left_out if min(image['width'], image['height']) < smallest]
    empty = [image for image in left_out if min(image['width'], image['height']) >= smallest]
    total = len(content['images'])
    for images, what, advice in (
        (empty, 'have no object of these classes', 'filter_cfg=dict(filter_empty_gt=False) keeps them, as background'),
        (small, f'are smaller than {smallest} pixels', 'filter_cfg=dict(min_size=0) keeps them'),
    ):
        if images:
            findings.add(
                ERROR if len(left_out) == total else WARNING if 2 * len(images) >= total else NOTE,
                f'{len(images)} of {total} images {what} and are left out: '
                + listed(image['file_name'] for image in images),
                advice,
            )


def _count_objects(dataset: object, findings: Findings, part: Part, training: bool) -> None:
    """Counts the objects that the data set returns."""
    objects, ignored, images, empty = Counter(), Counter(), Counter(), 0
    for index in range(len(dataset)):
        instances = dataset.get_data_info(index).get('instances', [])
        empty += not instances
        for instance in instances:
            (ignored if instance['ignore_flag'] else objects)[instance['bbox_label']] += 1
        images.update({instance['bbox_label'] for instance in instances})
    part.facts['images'] += f', {empty} without an object' if empty else ''
    part.facts['objects'] = f'{sum(objects.values())}, and {sum(ignored.values())} that are ignored (iscrowd)'
    if part.classes is None:
        return
    part.columns = ('class', 'images', 'objects', 'ignored')
    part.rows = [(name, images[i], objects[i], ignored[i]) for i, name in enumerate(part.classes)]
    absent = [name for index, name in enumerate(part.classes) if not objects[index]]
    if not objects:
        if not findings.has_error:
            findings.add(ERROR, 'no object is left to learn', 'label objects of these classes')
    elif absent and not findings.has_error:
        findings.add(
            WARNING if training else NOTE,
            f'{len(absent)} of {len(part.classes)} classes have no object: {listed(map(repr, absent))}',
            'label objects of them, or take them out of classes and num_classes'
            if training
            else 'the AP leaves them out',
        )


def _check_evaluator(evaluated: str, ann_file: str, findings: Findings) -> None:
    """Checks that the evaluator reads the file of the data set."""
    path = Path(evaluated)
    if '://' in evaluated or '://' in ann_file or not Path(ann_file).is_file():
        return
    if not path.is_file():
        text = f'val_evaluator reads {evaluated!r}, which does not exist'
    elif not path.samefile(ann_file) and not filecmp.cmp(path, ann_file, shallow=False):
        text = f'val_evaluator reads {evaluated!r}, the data set {ann_file!r}'
    else:
        return
    findings.add(
        ERROR, text, f'val_evaluator = dict(ann_file={ann_file!r}), as data_root of the data set does not change it'
    )


def _draw_loaded(info: dict, names: list[str]) -> View:
    """Draws an image and its annotations as the loading steps return them."""
    image = info['img'] if info['img'].ndim == 3 else info['img'][..., None]
    boxes = info.get('gt_bboxes', ())
    boxes = boxes.tensor.numpy() if hasattr(boxes, 'tensor') else np.asarray(boxes)
    ignored = info.get('gt_ignore_flags', np.zeros(len(boxes), bool))
    return _view(image, boxes, info.get('gt_bboxes_labels', ()), ignored, info.get('gt_masks'),
                 info.get('gt_seg_map'), names)  # fmt: skip


def _draw_packed(item: dict, names: list[str]) -> View:
    """Draws what a pipeline returns."""
    sample = item['data_samples']
    boxes, labels, ignored, masks = [], [], [], []
    for key in ('gt_instances', 'ignored_instances'):
        instances = sample.get(key)
        if instances is None or 'bboxes' not in instances:
            continue
        found = instances.bboxes
        boxes += list((found.tensor if hasattr(found, 'tensor') else found).numpy())
        labels += instances.labels.tolist()
        ignored += [key == 'ignored_instances'] * len(instances.labels)
        if 'masks' in instances:
            masks += list(instances.masks.to_ndarray())
    labels_of_pixels = (
        sample.gt_sem_seg.get('data', sample.gt_sem_seg.get('sem_seg')) if 'gt_sem_seg' in sample else None
    )
    seg_map = None if labels_of_pixels is None else labels_of_pixels.squeeze().numpy()
    return _view(item['inputs'].permute(1, 2, 0).numpy(), np.array(boxes), labels, ignored, masks, seg_map, names)


def _view(
    image: np.ndarray, boxes: np.ndarray, labels: list, ignored: list, masks: object, seg_map: np.ndarray | None,
    names: list[str],
) -> View:  # fmt: skip
    """Draws an image (H, W, C) in blue, green, red, with its masks and label map in the classes' colours."""
    picture = _to_bgr(image)
    masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks
    layer = picture.copy()
    if seg_map is not None and seg_map.shape == picture.shape[:2]:
        for label in np.unique(seg_map).tolist():
            layer[seg_map == label] = (255, 255, 255) if label >= max(len(names), 1) else _colour(label)[::-1]
    for mask, label in zip(() if masks is None else masks, labels, strict=False):
        if mask.shape == picture.shape[:2]:
            layer[mask > 0] = _colour(int(label))[::-1]
    picture = cv2.addWeighted(picture, 0.5, layer, 0.5, 0)
    scale = min(1.0, PICTURE_SIDE / max(picture.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    data = cv2.imencode('.jpg', cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))[1]
    drawn = []
    for box, label, flag in zip(boxes.reshape(-1, 4) * scale, labels, ignored, strict=True):
        name = names[int(label)] if int(label) < len(names) else f'label {int(label)}'
        left, top, right, bottom = (round(float(value), 1) for value in np.nan_to_num(box))
        drawn.append({'x': left, 'y': top, 'w': max(0.0, right - left), 'h': max(0.0, bottom - top), 'name': name,
                      'colour': '#{:02x}{:02x}{:02x}'.format(*_colour(int(label))), 'ignored': bool(flag)})  # fmt: skip
    if seg_map is not None:
        for place, label in enumerate(np.unique(seg_map).tolist()[:14]):
            name = names[label] if label < len(names) else f'{label}, no class'
            colour = '#{:02x}{:02x}{:02x}'.format(*_colour(label)) if label < len(names) else '#ffffff'
            drawn.append({'x': 4, 'y': 4 + 18 * place, 'w': 0.1, 'h': 14, 'name': name, 'colour': colour,
                          'ignored': False})  # fmt: skip
    return View(base64.b64encode(data).decode(), width, height, drawn)


def _colour(label: int) -> tuple[int, int, int]:
    return COLOURS[label % len(COLOURS)]


def _to_bgr(image: np.ndarray) -> np.ndarray:
    """Returns an image of any dtype and number of channels as one that can be drawn, (H, W, 3) in uint8."""
    image = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    if image.dtype != np.uint8:
        low, high = np.percentile(image, (1, 99))
        image = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def describe(check: DatasetCheck) -> str:
    """Returns tables and findings as text."""
    lines = []
    for part in check.parts:
        lines.append(part.source)
        lines += [f'  {name:13} {value}' for name, value in part.facts.items()]
        if part.rows and len(part.rows) <= PRINTED_CLASSES:
            table = [part.columns, *part.rows]
            widths = [max(len(str(row[column])) for row in table) for column in range(len(part.columns))]
            for name, *values in table:
                cells = '  '.join(f'{value!s:>{width}}' for value, width in zip(values, widths[1:], strict=True))
                lines.append(f'    {name!s:{widths[0]}}  {cells}')
        lines.append('')
    for finding in check.findings:
        lines.append(f'{finding.level:8} {finding.source}: {finding.text}')
        lines.append(f'         -> {finding.advice}')
    counts = Counter(finding.level for finding in check.findings)
    lines.append(', '.join(f'{counts[level]} {level}{"" if counts[level] == 1 else "s"}'
                           for level in (ERROR, WARNING, NOTE)))  # fmt: skip
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='config file of MMDetection or MMSegmentation')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/check_dataset.html'), help='HTML file to write')
    parser.add_argument('--pictures', type=int, default=8, help='number of images to draw of each data set (default 8)')
    parser.add_argument(
        '--images', type=int, help='number of images to read of each data set, evenly spaced (default all)'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='changes of the config'
    )
    args = parser.parse_args()
    if args.pictures < 0 or (args.images is not None and args.images < 1):
        parser.error(f'expected --pictures from 0 and --images from 1 on, got {args.pictures} and {args.images}')
    if not args.config.is_file():
        parser.error(f'{args.config}: expected a config file, found no such file')
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    for key in ('model', 'train_dataloader'):
        if not isinstance(config.get(key), ConfigDict):
            parser.error(f'{args.config}: expected a config with the key {key}, found {", ".join(config) or "no key"}')
    if config.get('default_scope') not in TOOLBOXES:
        parser.error(
            f'{args.config}: expected a config of {" or ".join(TOOLBOXES)}, found default_scope '
            f'{config.get("default_scope")!r}'
        )
    check = DatasetCheck(config, args.images, args.pictures)
    check.run()
    check.findings.sort(key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level))
    page = Environment(autoescape=True).from_string(PAGE)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        page.render(title=f'Data of {args.config.name}', date=datetime.date.today().isoformat(), parts=check.parts,
                    findings=check.findings),
        encoding='utf-8',
    )  # fmt: skip
    print(describe(check))
    print(f'wrote {args.out}')
    return 1 if any(finding.level == ERROR for finding in check.findings) else 0


if __name__ == '__main__':
    sys.exit(main())
