"""Runs a detector that tools/export_onnx.py wrote, without PyTorch: pictures, and detections in COCO's JSON.

Examples:
    python tools/run_onnx.py mask_rcnn.onnx street.jpg
    python tools/run_onnx.py mask_rcnn.onnx photos/ --runtime openvino --annotations instances.json --out results

Needs NumPy, OpenCV or Pillow, and onnxruntime or openvino; nothing of this package. With OpenCV the result is that of
mmdet's `inference_detector`; Pillow reads the same pictures, but the resize differs in the last bit of a pixel.

Writes into --out a picture for each image, and ``detections.json``, which `pycocotools` evaluates: ids of images and
categories are those of --annotations, or else counted from 1 in the order of the names.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None
    from PIL import Image, ImageDraw, ImageOps

METADATA = 'mmspatialmamba'
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
RUNTIMES = ('onnxruntime', 'openvino')


@dataclass(frozen=True)
class Detections:
    """What was found in an image, best first.

    Attributes:
        boxes: Left, top, right and bottom in pixels of the image as it was read, (K, 4), float32.
        scores: (K,), float32.
        labels: Class, counted from 0, (K,), int64.
        masks: Pixels of each object, (K, H, W), bool; None without a mask head.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


def read_image(path: Path) -> np.ndarray:
    """Returns an image, (H, W, 3), uint8, BGR, turned as its EXIF data say.

    Raises:
        ValueError: The file is no image.
    """
    image = None
    if cv2:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
    else:
        try:
            image = np.array(ImageOps.exif_transpose(Image.open(path)).convert('RGB'))[..., ::-1]
        except OSError as error:
            raise ValueError(f'{path}: expected an image file, found {error}') from error
    if image is None:
        raise ValueError(f'{path}: expected an image file, found no image')
    return image


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image, (H, W, 3), uint8, BGR."""
    if cv2:
        path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    else:
        Image.fromarray(image[..., ::-1]).save(path)


def bilinear_weights(positions: np.ndarray, count: int) -> np.ndarray:
    """Returns the share of each of ``count`` cells in the value at each position, (P, count), float32.

    Args:
        positions: Where 0 is the centre of the first cell and 1 that of the second, (P,).
        count: Number of cells; outside of them there are zeros.
    """
    return np.maximum(0, 1 - abs(positions[:, None] - np.arange(count))).astype(np.float32)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns an image resized as OpenCV does it, bilinear and without smoothing."""
    if cv2:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    matrices = []
    for new, old in ((height, image.shape[0]), (width, image.shape[1])):
        centres = (np.arange(new) + 0.5) * (old / new) - 0.5
        matrices.append(bilinear_weights(centres.clip(0, old - 1), old))
    resized = np.einsum('ij,jkc,lk->ilc', matrices[0], image.astype(np.float32), matrices[1], optimize=True)
    return (resized + 0.5).astype(np.uint8)


def fitted_size(width: int, height: int, scale: list[int], keep_ratio: bool) -> tuple[int, int]:
    """Returns width and height after the resize of a config's test pipeline."""
    if not keep_ratio:
        return scale[0], scale[1]
    factor = min(max(scale) / max(width, height), min(scale) / min(width, height))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def open_onnxruntime(path: Path) -> tuple[Callable, dict[str, str]]:
    """Returns a function from the image to the outputs, and the file's metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (name,) = [value.name for value in session.get_inputs()]
    return lambda image: session.run(None, {name: image}), session.get_modelmeta().custom_metadata_map


def open_openvino(path: Path) -> tuple[Callable, dict[str, str]]:
    """Returns a function from the image to the outputs, and the file's metadata.

    In float32: on processors with bfloat16 that is OpenVINO's default, which loses detections.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    metadata = {}
    if model.has_rt_info(['framework', METADATA]):
        metadata[METADATA] = model.get_rt_info(['framework', METADATA]).astype(str)
    return lambda image: [np.array(value) for value in compiled([image]).values()], metadata


class Detector:
    """A detector in an ONNX file.

    Args:
        path: File that tools/export_onnx.py wrote.
        runtime: 'onnxruntime' or 'openvino'.

    Attributes:
        classes: Names of the classes; empty where the config named none.

    Raises:
        ValueError: The file is none of a whole detector.
    """

    def __init__(self, path: Path, runtime: str = 'onnxruntime'):
        if not path.is_file():
            raise ValueError(f'{path}: expected an ONNX file, found no such file')
        self._run, metadata = {'onnxruntime': open_onnxruntime, 'openvino': open_openvino}[runtime](path)
        if METADATA not in metadata:
            raise ValueError(
                f'{path}: expected a whole detector as tools/export_onnx.py writes it, found no metadata {METADATA}'
            )
        self._metadata = json.loads(metadata[METADATA])
        self.classes = self._metadata['classes']

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the input, (1, 3, H1, W1), float32, and how much wider and higher it is than the image, (2,)."""
        height, width = image.shape[:2]
        new_width, new_height = fitted_size(width, height, self._metadata['scale'], self._metadata['keep_ratio'])
        image = resize(image, new_width, new_height).astype(np.float32)
        pad = self._metadata['pad']
        if pad:
            rest = [(0, max(0, pad['height'] - new_height)), (0, max(0, pad['width'] - new_width))]
            channels = [np.pad(image[..., i], rest, constant_values=value) for i, value in enumerate(pad['value'])]
            image = np.stack(channels, -1)
        factors = np.array([new_width / width, new_height / height], np.float32)
        return np.ascontiguousarray(image.transpose(2, 0, 1)[None]), factors

    def __call__(self, image: np.ndarray) -> Detections:
        """Finds objects in an image, (H, W, 3), uint8, BGR."""
        inputs, factors = self.prepare(image)
        boxes, scores, labels, *masks = self._run(inputs)
        found = scores > 0
        boxes = boxes[found] / np.tile(factors, 2)
        pasted = None
        if masks:
            pasted = np.zeros((len(boxes), *image.shape[:2]), bool)
            for canvas, mask, box in zip(pasted, masks[0][found], boxes, strict=True):
                paste(canvas, mask, box, self._metadata['mask_threshold'])
        return Detections(boxes, scores[found], labels[found], pasted)

    def name(self, label: int) -> str:
        """Returns the name of a class."""
        return self.classes[label] if label < len(self.classes) else f'class {label + 1}'


def paste(canvas: np.ndarray, mask: np.ndarray, box: np.ndarray, threshold: float) -> None:
    """Sets the pixels of an object.

    Args:
        canvas: (H, W), bool, changed in place.
        mask: Probabilities over the box, (h, w), float32.
        box: Left, top, right and bottom in pixels of the canvas.
        threshold: Smallest probability of an object's pixel.
    """
    first = np.maximum(np.floor(box[:2]) - 1, 0).astype(int)
    last = np.minimum(np.ceil(box[2:]) + 1, canvas.shape[::-1]).astype(int)
    weights = []
    for axis in (1, 0):
        start, end = box[axis], box[axis + 2]
        if not end > start:
            return
        centres = np.arange(first[axis], last[axis], dtype=np.float32) + np.float32(0.5)
        cells = mask.shape[1 - axis]
        weights.append(bilinear_weights((centres - start) / (end - start) * cells - np.float32(0.5), cells))
    inside = weights[0] @ mask @ weights[1].T >= threshold
    canvas[first[1] : last[1], first[0] : last[0]] = inside


def encode_mask(mask: np.ndarray) -> dict:
    """Returns a mask (H, W) as COCO's compressed run lengths, as `pycocotools.mask.encode` writes them."""
    pixels = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
    if pixels.size and pixels[0]:
        runs.insert(0, 0)  # the first run is one of zeros
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        while True:
            digit, value = value & 31, value >> 5
            done = value == (-1 if digit & 16 else 0)
            text.append(chr(48 + (digit if done else digit | 32)))
            if done:
                break
    return {'size': list(mask.shape), 'counts': ''.join(text)}


def draw(image: np.ndarray, found: Detections, names: list[str], threshold: float) -> np.ndarray:
    """Returns a copy of an image with the objects whose score reaches a threshold.

    Args:
        image: (H, W, 3), uint8, BGR.
        found: The objects.
        names: What to write at each of them.
        threshold: Smallest score that is drawn.
    """
    image = image.copy()
    for index in np.flatnonzero(found.scores >= threshold)[::-1]:
        color = np.random.default_rng(int(found.labels[index])).integers(64, 256, 3)
        if found.masks is not None:
            mask = found.masks[index]
            image[mask] = image[mask] // 2 + (color // 2).astype(np.uint8)
        left, top, right, bottom = (int(value) for value in found.boxes[index].round())
        color, text = tuple(color.tolist()), f'{names[index]} {found.scores[index]:.2f}'
        if cv2:
            cv2.rectangle(image, (left, top), (right, bottom), color, 1)
            cv2.putText(image, text, (left, max(10, top - 3)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, color, 1, cv2.LINE_AA)
        else:
            picture = Image.fromarray(image[..., ::-1])
            pen = ImageDraw.Draw(picture)
            pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=color[::-1])
            pen.text((left, max(0, top - 12)), text, fill=color[::-1])
            image = np.array(picture)[..., ::-1].copy()
    return image


@dataclass(frozen=True)
class Ids:
    """The ids of images, by file name, and of categories, by label."""

    images: dict[str, int]
    categories: list[int]


def read_ids(annotations: Path | None, images: list[Path], classes: list[str]) -> Ids:
    """Returns COCO's ids as an annotation file has them, or counted from 1 without one.

    Raises:
        ValueError: The file has no entry for an image or a class.
    """
    if annotations is None:
        return Ids({path.name: index for index, path in enumerate(images, 1)}, list(range(1, len(classes) + 1)))
    if not annotations.is_file():
        raise ValueError(f'{annotations}: expected a COCO annotation file, found no such file')
    content = json.loads(annotations.read_text())
    known = {Path(entry['file_name']).name: entry['id'] for entry in content['images']}
    categories = {entry['name']: entry['id'] for entry in content['categories']}
    for kind, wanted, found in (('image', [path.name for path in images], known), ('class', classes, categories)):
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f'{annotations}: expected an entry for {kind} {missing[0]}, found none')
    return Ids({path.name: known[path.name] for path in images}, [categories[name] for name in classes])


def to_coco(found: Detections, image_id: int, categories: list[int]) -> list[dict]:
    """Returns the entries of COCO's results format of an image."""
    entries = []
    for index, (box, score, label) in enumerate(zip(found.boxes, found.scores, found.labels, strict=True)):
        left, top, right, bottom = box.tolist()
        category = categories[label] if label < len(categories) else int(label) + 1
        entry = {'image_id': image_id, 'category_id': category, 'bbox': [left, top, right - left, bottom - top]}
        entry['score'] = float(score)
        if found.masks is not None:
            entry['segmentation'] = encode_mask(found.masks[index])
        entries.append(entry)
    return entries


def find_images(path: Path) -> list[Path]:
    """Returns an image, or the images of a folder by name.

    Raises:
        ValueError: There is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f'{path}: expected an image or a folder of images, found no such file')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(f'{path}: expected a folder with images ({", ".join(SUFFIXES)}), found none')
    return images


def with_bar(images: list[Path]) -> Iterator[Path]:
    """Yields images, with a bar on a terminal of how many are done."""
    shown = sys.stderr.isatty() and len(images) > 1
    for index, path in enumerate(images, 1):
        yield path
        if shown:
            done = 40 * index // len(images)
            end = '\n' if index == len(images) else ''
            print(f'\r[{"#" * done}{"." * (40 - done)}] {index}/{len(images)}', end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='ONNX file of a whole detector')
    parser.add_argument('images', type=Path, help='image, or folder of images')
    parser.add_argument('--runtime', choices=RUNTIMES, default=RUNTIMES[0], help='default onnxruntime')
    parser.add_argument('--out', type=Path, default=Path('detections'), help='folder to write (default detections)')
    parser.add_argument('--threshold', type=float, default=0.3, help='smallest score that is drawn (default 0.3)')
    parser.add_argument('--annotations', type=Path, help='COCO file with the ids of images and categories')
    args = parser.parse_args()
    try:
        detector = Detector(args.file, args.runtime)
        images = find_images(args.images)
        ids = read_ids(args.annotations, images, detector.classes)
        args.out.mkdir(parents=True, exist_ok=True)
        entries = []
        for path in with_bar(images):
            image = read_image(path)
            found = detector(image)
            entries += to_coco(found, ids.images[path.name], ids.categories)
            names = [detector.name(label) for label in found.labels]
            write_image(args.out / f'{path.stem}.png', draw(image, found, names, args.threshold))
    except ImportError as error:
        sys.exit(f'run_onnx: expected {args.runtime}, found {error}')
    except ValueError as error:
        sys.exit(f'run_onnx: {error}')
    (args.out / 'detections.json').write_text(json.dumps(entries))
    print(f'{len(entries)} detections in {len(images)} images: {args.out}')


if __name__ == '__main__':
    main()
