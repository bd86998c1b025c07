"""Label maps of semantic segmentation: which numbers are in them, and which of them are classes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .findings import ERROR, NOTE, WARNING, Findings, by_share, listed
from .images import SIDEWAYS, find_file, nearest_folder

BACKGROUND = ('background', 'bg', '_background_', 'back', 'none', 'other', 'rest', 'void')
IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp')
PAGE = 'docs/own_segmentation.md, "Label maps"'


class LabelMapChecks:
    """Gathers what is wrong with the label maps of one data set.

    Args:
        source: Name of the data set, for its findings.
        total: Number of its images.
        classes: Its classes, or None if they are wrong in themselves.
        reduce_zero_label: Whether 0 is ignored and every other number is lowered by one.
        ignore_index: The number that is no class, for the loss.
        suffix: How the names of label maps end, behind that of the image.
        folder: Folder of the data set, for advice about missing files.
    """

    def __init__(
        self,
        source: str,
        total: int,
        classes: Sequence[str] | None,
        reduce_zero_label: bool,
        ignore_index: int,
        suffix: str,
        folder: str,
    ):
        self.source, self.total, self.classes = source, total, classes
        self.suffix, self.folder = suffix, folder
        self.reduce_zero_label, self.ignore_index = reduce_zero_label, ignore_index
        self.pixels = np.zeros(256, np.int64)
        self.images: Counter[int] = Counter()
        self.raw: Counter[int] = Counter()
        self.wrong: dict[int, list[str]] = defaultdict(list)
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.count = 0

    def add_missing(self, path: str) -> None:
        """Notes a label map that does not exist."""
        self.faults['missing'].append(path)

    def add(self, path: str, raw: np.ndarray, labels: np.ndarray, shape: tuple[int, int], orientation: int) -> None:
        """Notes a label map.

        Args:
            path: Its path.
            raw: What is in the file, (H, W) or (H, W, C).
            labels: What the pipeline's loader made of it, (H, W).
            shape: Height and width of its image, as loaded.
            orientation: EXIF orientation of the image, 1 for none.
        """
        self.count += 1
        if raw.ndim == 3:
            colours = raw[..., : 1 if raw.shape[2] == 2 else 3]  # without opacity
            gray = bool((colours == colours[..., :1]).all())
            self.faults['gray colours' if gray else 'colours'].append(path)
            if not gray and 'colours' not in self.reasons:
                values = colours.astype(np.int64) @ (1, 1 << 16, 1 << 32)
                self.reasons['colours'] = f'{len(np.unique(values))} colours'
            return
        if labels.shape != shape:
            turned = labels.shape == shape[::-1] and orientation in SIDEWAYS
            kind = 'exif' if turned else 'size'
            self.faults[kind].append(path)
            self.reasons.setdefault(kind, f'{labels.shape[1]} x {labels.shape[0]}, its image {shape[1]} x {shape[0]}')
        if not np.issubdtype(raw.dtype, np.integer) and raw.dtype != bool:
            self.faults['fractions'].append(path)
            return
        if raw.max(initial=0) > 255 or raw.min(initial=0) < 0:
            self.faults['large'].append(path)
            self.reasons.setdefault('large', f'{raw.min()} to {raw.max()}')
            return
        self.raw.update(np.flatnonzero(np.bincount(raw.astype(np.uint8).ravel(), minlength=256)).tolist())
        pixels = np.bincount(labels.ravel(), minlength=256)
        self.pixels += pixels
        for value in np.flatnonzero(pixels).tolist():
            self.images[value] += 1
            if self.classes is not None and value >= len(self.classes) and value != self.ignore_index:
                self.wrong[value].append(path)

    def report(self, findings: Findings, training: bool) -> None:
        """Adds the findings."""
        for kind, paths in self.faults.items():
            level, text, advice = self._describe(kind, paths)
            names = listed(Path(path).name for path in paths)
            findings.add(level or by_share(len(paths), self.total), f'{len(paths)} of {self.total} {text}: {names}',
                         advice, paths)  # fmt: skip
        if self.classes is None or not self.pixels.sum():
            return
        if not self._report_values(findings):
            self._report_absent(findings, training)

    def table(self) -> list[tuple[str, int, str]]:
        """Returns for each class its name, the number of label maps that have it, and its share of the pixels."""
        total = max(1, self.pixels.sum())
        rows = [(name, index) for index, name in enumerate(self.classes or ())]
        rows += [
            ('(ignored)' if value == self.ignore_index else f'(number {value})', value)
            for value in sorted(self.images)
            if value >= len(self.classes or ())
        ]
        return [(name, self.images[value], f'{self.pixels[value] / total:.2%}') for name, value in rows]

    def _describe(self, kind: str, paths: list[str]) -> tuple[str | None, str, str]:
        """Returns level, what is said after the number of label maps, and advice."""
        reason = self.reasons.get(kind, '')
        lossy = Path(paths[0]).suffix.lower() in ('.jpg', '.jpeg')
        if kind == 'missing':
            return (
                ERROR,
                'images have no label map where one is expected',
                find_label_map(paths[0], self.suffix, self.folder),
            )
        if kind == 'colours':
            advice = f'write a PNG file of class numbers for each: {PAGE}'
            if Image.open(paths[0]).mode == 'P':
                advice = (
                    "these are palette files: take LoadAnnotations' imdecode_backend='pillow', which reads the numbers"
                )
            return ERROR, f'label maps are colour images ({reason} in the first), not class numbers', advice
        if kind == 'gray colours':
            return (
                ERROR,
                'label maps are colour images whose channels are the same',
                f'write one channel of them, as PNG: {PAGE}' + (' (JPEG changes the numbers)' if lossy else ''),
            )
        if kind == 'exif':
            return (
                ERROR,
                f'photographs are turned by the loader, as their EXIF says, but their label maps are not ({reason})',
                "take LoadImageFromFile's color_type='color_ignore_orientation', or remove the tag from the files",
            )
        if kind == 'size':
            return (
                ERROR,
                f'label maps have another size than their image ({reason})',
                'label the images in the size that they have (resize label maps by nearest neighbour only)',
            )
        if kind == 'fractions':
            return ERROR, 'label maps hold fractions, not class numbers', f'write PNG files of 8 bits: {PAGE}'
        return (
            ERROR,
            f'label maps hold numbers outside of 0 to 255 ({reason}), which the loader cuts to 8 bits',
            f'number the classes from 0, with 255 for what is no class, in PNG files of 8 bits: {PAGE}',
        )

    def _report_values(self, findings: Findings) -> bool:
        """Adds findings about numbers that are no class, or mean another one; returns whether there are any."""
        last = len(self.classes) - 1
        values = sorted(self.raw)
        used = [value for value in values if value != self.ignore_index]
        if values == [0, 255] or values == [255]:
            findings.add(
                ERROR,
                f'the label maps hold {listed(values)} alone, and {self.ignore_index} means "no class": nothing but '
                'number 0 is learned',
                f'write 1 in place of 255: {PAGE}',
            )
            return True
        if self.reduce_zero_label and used == list(range(last + 1)) and 0 in values:
            findings.add(
                ERROR,
                f'reduce_zero_label=True ignores number 0 and lowers the others, but the label maps hold 0 to {last} '
                f'for {last + 1} classes: {self.classes[0]!r} is dropped and {self.classes[-1]!r} never occurs',
                'set reduce_zero_label=False in the data set, and leave it out of LoadAnnotations',
            )
            return True
        if self.reduce_zero_label and 0 in values and str(self.classes[0]).strip().casefold() in BACKGROUND:
            findings.add(
                ERROR,
                f'reduce_zero_label=True ignores number 0, which is in {self.raw[0]} of {self.count} label maps, and '
                f'makes number 1 the class {self.classes[0]!r}',
                f'set reduce_zero_label=False, or take {self.classes[0]!r} out of the classes',
            )
            return True
        if not self.wrong:
            return False
        numbers = sorted(self.wrong)
        share = self.pixels[numbers].sum() / self.pixels.sum()
        paths = list(dict.fromkeys(path for value in numbers for path in self.wrong[value]))
        findings.add(
            ERROR,
            f'label maps hold {listed(values, 12)}; with reduce_zero_label={self.reduce_zero_label} the numbers '
            f'{listed(numbers, 8)} are left, but there are {last + 1} classes, 0 to {last} ({share:.2%} of the pixels '
            f'in {len(paths)} of {self.count} label maps)',
            self._advise_values(values, used, share, paths),
            paths,
        )
        return True

    def _advise_values(self, values: list[int], used: list[int], share: float, paths: list[str]) -> str:
        count = len(self.classes)
        if Path(paths[0]).suffix.lower() in ('.jpg', '.jpeg'):
            return 'JPEG changes the numbers: export the label maps as PNG'
        if not self.reduce_zero_label and used and used[-1] == count:
            return (
                "add the class of number 0 ('background', say) to classes and num_classes, or set "
                'reduce_zero_label=True to ignore it'
            )
        if len(used) == count or len(values) == count:
            return f'these are gray levels or other ids: write 0 to {count - 1} in their place: {PAGE}'
        if share < 0.02 and len(used) > count:
            return 'numbers between the classes come from interpolation: resize label maps by nearest neighbour only'
        return f'add the classes that are missing (classes, num_classes), or write 255 for these numbers: {PAGE}'

    def _report_absent(self, findings: Findings, training: bool) -> None:
        """Adds findings about classes that do not occur."""
        absent = [name for index, name in enumerate(self.classes) if not self.pixels[index]]
        present = len(self.classes) - len(absent)
        if not present:
            findings.add(
                ERROR,
                f'every pixel is ignored: the label maps hold {listed(sorted(self.raw))} alone',
                f'write the number of its class at each pixel: {PAGE}',
            )
        elif present == 1 and len(self.classes) > 1 and training:
            only = next(name for index, name in enumerate(self.classes) if self.pixels[index])
            findings.add(
                ERROR,
                f'of {len(self.classes)} classes only {only!r} occurs: there is nothing to learn',
                f'look at the numbers in the label maps ({listed(sorted(self.raw))}): {PAGE}',
            )
        elif absent:
            findings.add(
                WARNING if training else NOTE,
                f'{len(absent)} of {len(self.classes)} classes never occur: {listed(map(repr, absent))}',
                'add images of them, or take them out of classes and num_classes'
                if training
                else 'their IoU will be nan, and the mean leaves them out',
            )


def check_folders(dataset: object, findings: Findings) -> None:
    """Checks the folders of a data set that pairs images with label maps by their names.

    Args:
        dataset: A ``BaseSegDataset`` of MMSegmentation, whose files need not be read yet.
        findings: Where findings go.
    """
    folders = {}
    for key in ('img_path', 'seg_map_path'):
        folder = dataset.data_prefix.get(key)
        if not folder:
            findings.add(
                ERROR,
                f'data_prefix has no {key!r}, but {listed(map(repr, dataset.data_prefix))}',
                "data_prefix=dict(img_path='images/', seg_map_path='masks/')",
            )
        elif '://' not in folder and not Path(folder).is_dir():
            findings.add(ERROR, f'there is no folder {folder!r}', nearest_folder(Path(folder)))
        elif '://' not in folder:
            folders[key] = Path(folder)
    if dataset.ann_file and not Path(dataset.ann_file).exists():
        findings.add(ERROR, f'there is no file {dataset.ann_file!r}', 'correct ann_file, or leave it out to read all')
    if len(folders) < 2 or Path(dataset.ann_file or '.').is_file():
        return
    names = [str(file.relative_to(folders['img_path'])) for file in folders['img_path'].rglob('*') if file.is_file()]
    read = {name[: -len(dataset.img_suffix)] for name in names if name.endswith(dataset.img_suffix)}
    endings = Counter(
        Path(name).suffix
        for name in names
        if not name.endswith(dataset.img_suffix) and Path(name).suffix.lower() in IMAGE_ENDINGS
    )
    if not read:
        found = listed(f'{count} files end in {ending!r}' for ending, count in endings.most_common())
        findings.add(
            ERROR,
            f'no file in {str(folders["img_path"])!r} ends in {dataset.img_suffix!r}: {found or "it has no images"}',
            f'set img_suffix={endings.most_common(1)[0][0]!r} in the data set' if endings else 'correct data_prefix',
        )
        return
    if endings:
        findings.add(
            WARNING,
            f'{sum(endings.values())} images are not read, since they do not end in {dataset.img_suffix!r} but in '
            + listed(map(repr, endings)),
            'give all images one ending, or read each by a data set of its own (ConcatDataset)',
        )
    maps = [str(file.relative_to(folders['seg_map_path'])) for file in folders['seg_map_path'].rglob('*')]
    alone = [
        name
        for name in sorted(maps)
        if name.endswith(dataset.seg_map_suffix) and name[: -len(dataset.seg_map_suffix)] not in read
    ]
    if alone and folders['seg_map_path'] != folders['img_path']:
        findings.add(
            NOTE,
            f'{len(alone)} label maps have no image: {listed(alone)}',
            'add their images, or leave it so: they are not read',
        )


def find_label_map(path: str, suffix: str, folder: str) -> str:
    """Returns advice about a label map that does not exist: what the files of its folder are called."""
    wanted = Path(path)
    stem = wanted.name.removesuffix(suffix)
    if wanted.parent.is_dir():
        alike = sorted(file.name for file in wanted.parent.iterdir() if file.name.startswith(stem))
        if alike:
            return f'there is {alike[0]!r}: set seg_map_suffix={alike[0][len(stem) :]!r} in the data set'
    return find_file(path, folder)
