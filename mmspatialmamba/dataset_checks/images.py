"""Image files: whether they can be read, what is in them, and what a pipeline makes of them."""

import io
import math
import os
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFile

from .findings import ERROR, NOTE, WARNING, Findings, by_share, listed

ORIENTATION = 0x0112
"""The EXIF tag that says how a photograph is to be turned."""

SIDEWAYS = (5, 6, 7, 8)
"""Its values that exchange width and height."""

CHANNELS = {'1': 1, 'L': 1, 'P': 3, 'I': 1, 'F': 1, 'I;16': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4, 'CMYK': 4}
"""Channels of Pillow's modes; the colours of a palette are three."""


@dataclass(frozen=True)
class FileForm:
    """What is in an image file.

    Attributes:
        kind: Format, such as 'JPEG'.
        channels: Number of channels.
        bits: Bits of a channel's value.
        orientation: EXIF orientation, 1 if the file says none.
        complete: Whether all of the image is there.
        translucent: Whether a fourth channel, read as opacity, holds more than one value.
    """

    kind: str
    channels: int
    bits: int
    orientation: int
    complete: bool
    translucent: bool

    def __str__(self) -> str:
        return f'{self.channels} channel{"" if self.channels == 1 else "s"} of {self.bits} bits'


def read_form(content: bytes) -> FileForm:
    """Reads what is in an image file. A JPEG is not decoded unless its end is missing.

    Args:
        content: The bytes of the file.

    Raises:
        ValueError: This is no image that OpenCV or Pillow can read.
    """
    header, kind, orientation, reason = None, 'unknown', 1, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about large images, which are as good as others
            header = Image.open(io.BytesIO(content))
            kind = header.format
            orientation = header.getexif().get(ORIENTATION, 1)
    except Exception as error:  # Pillow raises whatever its decoders do; a PNG file is read to its end for this tag
        reason = error
    if kind == 'JPEG':
        return FileForm(kind, CHANNELS[header.mode], 8, orientation, _is_complete(content, header), False)
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    if image is None:
        if header is None:
            raise ValueError(f'neither OpenCV nor Pillow knows this format ({reason})' if content else 'it is empty')
        channels = CHANNELS.get(header.mode, 3)
        return FileForm(kind, channels, 8, orientation, _is_complete(content, header), False)
    channels = image.shape[2] if image.ndim == 3 else 1
    complete = header is None or _is_complete(content, header)
    translucent = channels == 4 and image[..., 3].min() != image[..., 3].max()
    return FileForm(kind, channels, image.dtype.itemsize * 8, orientation, complete, translucent)


def _is_complete(content: bytes, image: ImageFile.ImageFile) -> bool:
    """Returns False where the file ends before its image does, which OpenCV passes over."""
    ends = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}
    end = ends.get(image.format)
    if end is None or content.rstrip(b'\0').endswith(end):
        return True
    try:
        image.load()
    except (OSError, SyntaxError):
        return False
    return True


class ImageChecks:
    """Gathers what is wrong with the images of one data set.

    Args:
        source: Name of the data set, for its findings.
        total: Number of its images.
        folder: Folder of the images, for advice about missing files.
    """

    def __init__(self, source: str, total: int, folder: str):
        self.source, self.total, self.folder = source, total, folder
        self.forms: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.largest_of_16_bits = 0

    def add_missing(self, path: str) -> None:
        """Notes a file that does not exist."""
        self.faults['missing'].append(path)

    def add_failure(self, path: str, step: str, error: Exception) -> None:
        """Notes an image at which a step of the pipeline raised."""
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        kind = f'{step} stops: {type(error).__name__}'
        self.faults[kind].append(path)
        self.reasons.setdefault(kind, reason)

    def add(self, path: str, form: FileForm, image: np.ndarray, stated: tuple[float, float] | None) -> None:
        """Notes an image.

        Args:
            path: Its path.
            form: What is in the file.
            image: What the pipeline's loader made of it, (H, W) or (H, W, C).
            stated: Height and width that the annotations state, or None if they state none.
        """
        channels = image.shape[2] if image.ndim == 3 else 1
        self.forms[f'{form.kind} of {form}'] += 1
        self.loaded[f'{channels} x {image.dtype}'] += 1
        if not form.complete:
            self.faults['cut'].append(path)
        if form.bits > 8 and image.dtype == np.uint8:
            self.faults['16 bits'].append(path)
            self.largest_of_16_bits = max(self.largest_of_16_bits, int(image.max()))
        if form.channels == 4 and channels == 3 and form.translucent:
            self.faults['fourth'].append(path)
        if stated is not None and tuple(stated) != image.shape[:2]:
            turned = tuple(stated) == image.shape[1::-1] and form.orientation in SIDEWAYS
            kind = 'exif' if turned else 'swapped' if tuple(stated) == image.shape[1::-1] else 'size'
            self.faults[kind].append(path)
            self.reasons.setdefault(
                kind, f'{stated[1]} x {stated[0]} there, {image.shape[1]} x {image.shape[0]} as loaded'
            )
        elif form.orientation != 1:
            self.faults['turned'].append(path)

    def report(self, findings: Findings) -> None:
        """Adds the findings."""
        for kind, paths in self.faults.items():
            level, text, advice = self._describe(kind, paths)
            names = listed(Path(path).name for path in paths)
            findings.add(level or by_share(len(paths), self.total), f'{len(paths)} of {self.total} {text}: {names}',
                         advice, paths)  # fmt: skip
        channels = {form.split(' x ')[0] for form in self.loaded}
        if len(channels) > 1:
            found = listed(f'{count} images of {form}' for form, count in self.loaded.most_common())
            findings.add(
                ERROR,
                f'images have different numbers of channels when they are loaded: {found}',
                "take LoadImageFromFile's color_type='color' for three channels, or convert the files",
            )

    def _describe(self, kind: str, paths: list[str]) -> tuple[str | None, str, str]:
        """Returns level, what is said after the number of images, and advice."""
        reason = self.reasons.get(kind, '')
        if kind == 'missing':
            return ERROR, 'image files do not exist', find_file(paths[0], self.folder)
        if kind == 'cut':
            return WARNING, 'image files end too early (the lower part is gray or missing)', 'copy them again'
        if kind == '16 bits':
            return (
                WARNING,
                f'images have 16 bits a channel and are loaded with 8: the largest value is {self.largest_of_16_bits}',
                "take LoadImageFromFile's color_type='unchanged', and mean and std of these values",
            )
        if kind == 'fourth':
            return (
                NOTE,
                'images have a fourth channel, which is left out',
                "leave it so, or see configs/finetune_mask_rcnn_sm_t_4ch.py (color_type='unchanged')",
            )
        if kind == 'exif':
            return (
                None,
                f'photographs are turned by the loader, as their EXIF says, but were labelled as they are ({reason})',
                "take LoadImageFromFile's color_type='color_ignore_orientation', or turn the files and their labels",
            )
        if kind == 'turned':
            return (
                NOTE,
                'photographs carry an EXIF orientation, and it cannot be told whether the labels fit it',
                'look at the pictures on the page, or remove the tag from the files',
            )
        if kind == 'swapped':
            return (
                None,
                f'images have width and height exchanged in the annotations ({reason})',
                'exchange them in the file of annotations, or turn the images as they were labelled',
            )
        if kind == 'size':
            return (
                None,
                f'images have another size than in the annotations ({reason})',
                'label the images in the size that they have, or scale the annotations to it',
            )
        return ERROR, f'images: {kind.split(": ")[0]} ({reason})', advise(reason)


def advise(reason: str) -> str:
    """Returns advice for what a step of a pipeline raised."""
    for mark, advice in {
        'reduce_zero_label': 'give the data set and LoadAnnotations the same reduce_zero_label, or leave it out of '
        'LoadAnnotations',
        "KeyError: 'mask'": "add 'segmentation' to each annotation, or set with_mask=False",
        'failed to load image': 'these are no images that OpenCV reads: convert them to JPEG or PNG, or leave them out',
        'cv2': 'these are no images that OpenCV reads: convert them to JPEG or PNG, or leave them out',
        'UnidentifiedImageError': 'these are no images: convert them to PNG, or leave them out',
    }.items():
        if mark in reason:
            return advice
    return 'correct these images or their annotations, or leave them out'


def find_file(path: str, folder: str) -> str:
    """Returns advice about a file that does not exist: where one of this name is.

    Args:
        path: The missing file.
        folder: Folder of the data set, as the config states it.
    """
    wanted = Path(path)
    if '\\' in path:
        return 'write / in place of \\ in the paths'
    if not wanted.parent.is_dir():
        return f'there is no folder {str(wanted.parent)!r}: {nearest_folder(wanted.parent)}'
    if (wanted.parent / wanted.stem).is_file():
        return f'there is {wanted.stem!r}: names in ann_file have no ending, which img_suffix adds'
    for name in sorted(os.listdir(wanted.parent)):
        if name.casefold() == wanted.name.casefold() or Path(name).stem == wanted.stem:
            return f'there is {name!r} in this folder: write the name as it is there'
    root = Path(folder) if Path(folder).is_dir() else wanted.parent
    for count, (place, _, names) in enumerate(os.walk(root)):
        if wanted.name in names:
            return f'there is {str(Path(place, wanted.name))!r}: correct data_prefix, or the path in the annotations'
        if count > 1000:
            break
    return 'correct data_root, data_prefix or the names in the annotations, or leave these images out'


def find_annotations(path: Path, folder: str | None) -> str:
    """Returns advice about a file of annotations that does not exist: which JSON files there are.

    Args:
        path: The missing file.
        folder: ``data_root`` of the data set.
    """
    root = Path(folder or '.')
    if not root.is_dir():
        return f'there is no folder {str(root)!r}: {nearest_folder(root)}'
    files = [str(file.relative_to(root)) for file in sorted(root.glob('*.json')) + sorted(root.glob('*/*.json'))]
    if not files:
        return f'no JSON file lies in {str(root)!r} or its folders: {nearest_folder(root)}'
    return f'in data_root={str(root)!r} there is {listed(files, 6)}: correct ann_file'


def nearest_folder(path: Path) -> str:
    """Returns what lies in the deepest folder on the way to ``path`` that exists."""
    existing = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path('.'))
    names = [name + ('/' if (existing / name).is_dir() else '') for name in sorted(os.listdir(existing))]
    return f'{str(existing)!r} holds {listed(names, 6) or "nothing"}; correct data_root and data_prefix'


def check_network_input(
    findings: Findings, images: list[np.ndarray], normalized: list[np.ndarray], expected: int | None
) -> str:
    """Checks what the network gets of some images.

    Args:
        findings: Where findings go.
        images: What the pipeline returns, each (C, H, W).
        normalized: The same after the model's data preprocessor, each (C, H, W).
        expected: Number of channels that the backbone takes, None if it is not known.

    Returns:
        A description: channels, mean and deviation.
    """
    channels = Counter(image.shape[0] for image in normalized)
    values = [image.reshape(image.shape[0], -1) for image in normalized]
    count = len(values[0])
    same = [value for value in values if len(value) == count]
    means = np.mean([value.mean(1) for value in same], axis=0)
    deviations = np.mean([value.std(1) for value in same], axis=0)
    description = (
        f'{listed(f"{number} channels" for number in channels)}, mean {_numbers(means)}, '
        f'deviation {_numbers(deviations)}'
    )
    wrong = [number for number in channels if number != expected]
    if expected is not None and wrong:
        pipeline = images[0].shape[0]
        lost = f' (the pipeline returns {pipeline}, the data preprocessor makes {wrong[0]} of them)'
        findings.add(
            ERROR,
            f'the network gets {wrong[0]} channels and takes {expected}' + (lost if pipeline != wrong[0] else ''),
            f'set in_channels={wrong[0]} in the backbone, or load {expected} channels (color_type of '
            'LoadImageFromFile); for four channels see configs/finetune_mask_rcnn_sm_t_4ch.py',
        )
    if not all(math.isfinite(value) for value in (*means, *deviations)):
        findings.add(
            ERROR, f'the network gets values that are not finite: {description}', 'correct the images or std (not 0)'
        )
    elif np.abs(means).max() > 4 or deviations.max() > 4 or deviations.max() < 0.1:
        raw = np.concatenate([image.reshape(-1) for image in images])
        findings.add(
            WARNING,
            f'mean and deviation do not fit the images: the network gets mean {_numbers(means)}, deviation '
            f'{_numbers(deviations)}, where 0 and 1 are usual (the pipeline returns '
            f'{raw.min():.4g} to {raw.max():.4g})',
            'give mean and std of these images, once: either in data_preprocessor or in the transform Normalize',
        )
    return description


def _numbers(values: np.ndarray) -> str:
    return ' '.join(f'{value:.2f}' for value in values)
