"""Files of objects in COCO's format: what MMDetection would leave out, mistake or stop at."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path

from .findings import ERROR, NOTE, WARNING, Findings, by_share, listed

LISTS = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}
"""Each list of a file, and the keys that MMDetection reads of each of its entries, come what may."""

OTHER_FORMATS = {
    'data_list': "this is MMEngine's own format",
    'shapes': 'this is a file of labelme',
    '_via_img_metadata': 'this is a project of VIA',
}

BOX_TOLERANCE = 2.0
"""Pixels by which a box may reach beyond its image: labelling tools round."""

FAR = 100
"""Sides of the image: pycocotools draws polygons point by point, however far away they are."""


def read_coco(path: Path, findings: Findings) -> dict | None:
    """Reads a file of annotations.

    Returns:
        Its content, or None if it is none in COCO's format: ``findings`` says why.
    """
    export = "export it again in COCO's format (object detection or instance segmentation)"
    try:
        text = path.read_text(encoding='utf-8')
        content = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        findings.add(ERROR, f'{path} cannot be read: {error}', export)
        return None
    except json.JSONDecodeError as error:
        found = 'it is empty' if not text.strip() else f'{error}, in {text[max(0, error.pos - 20) : error.pos + 20]!r}'
        findings.add(ERROR, f'{path} is no JSON: {found}', export)
        return None
    if not isinstance(content, dict):
        findings.add(ERROR, f'{path}: expected a JSON object, found a {type(content).__name__}', export)
        return None
    for key in LISTS:
        if not isinstance(content.get(key), list):
            kind = next((text for mark, text in OTHER_FORMATS.items() if mark in content), 'not in this format')
            found = 'no such key' if key not in content else type(content[key]).__name__
            findings.add(
                ERROR,
                f'{path}: expected the list {key!r}, found {found} among {listed(map(repr, content), 6)} ({kind})',
                'label the images, then ' + export if key == 'annotations' else export,
            )
        elif not content[key]:
            findings.add(ERROR, f'{path}: the list {key!r} is empty', 'label the images, then ' + export)
        elif odd := [entry for entry in content[key] if not isinstance(entry, dict)]:
            findings.add(ERROR, f'{path}: {len(odd)} of {key!r} are no objects, such as {str(odd[0])[:40]!r}', export)
        else:
            continue
        return None
    return content


def check_coco(
    content: dict,
    findings: Findings,
    classes: Sequence[str] | None,
    own_classes: bool,
    masks: bool,
    evaluated: bool,
) -> set:
    """Checks a file's content, as MMDetection's data set and COCO's evaluation read it.

    Args:
        content: What `read_coco` returned.
        findings: Where findings go.
        classes: Classes of the data set, or None if they are wrong in themselves.
        own_classes: Whether the config names them; else they are the 80 of COCO.
        masks: Whether masks are read of the file.
        evaluated: Whether COCO's evaluation reads the file, which wants ``iscrowd`` too.

    Returns:
        Ids of images that must not be loaded: they have no path, or drawing their polygons would take all memory.
    """
    complete = _check_entries(content, findings, evaluated)
    if not _check_ids(content, findings, evaluated) or not complete:
        return set()
    if classes is not None:
        _check_names(content, findings, classes, own_classes)
    return _check_images(content['images'], findings) | _check_annotations(content, findings, masks)


def _check_entries(content: dict, findings: Findings, evaluated: bool) -> bool:
    """Checks that every entry has the keys that are read; returns whether they all have."""
    complete = True
    for name, keys in LISTS.items():
        entries = content[name]
        for key in keys:
            count = sum(key not in entry for entry in entries)
            if count:
                complete = False
                advice = {
                    'area': "add it: width times height of the box, or the mask's number of pixels",
                    'bbox': 'add it: [left, top, width, height] in pixels',
                }.get(key, "add it, or export the file again in COCO's format")
                findings.add(ERROR, f'{count} of {len(entries)} {name} have no {key!r}: MMDetection stops', advice)
    count = sum('iscrowd' not in annotation for annotation in content['annotations'])
    if count:
        findings.add(
            ERROR if evaluated else WARNING,
            f"{count} of {len(content['annotations'])} annotations have no 'iscrowd': "
            + ("COCO's evaluation stops" if evaluated else 'training takes 0, an evaluation on this file would stop'),
            "add 'iscrowd': 0 to each",
        )
    return complete


def _check_ids(content: dict, findings: Findings, evaluated: bool) -> bool:
    """Checks ids; returns whether entries can be told apart by them."""
    usable = True
    for name in LISTS:
        ids = [entry['id'] for entry in content[name] if 'id' in entry]
        odd = [value for value in ids if not isinstance(value, int) or isinstance(value, bool)]
        if odd:
            unusable = any(isinstance(value, (list, dict)) for value in odd)
            usable &= not unusable
            findings.add(
                ERROR if name == 'annotations' or unusable else WARNING,
                f'ids of {len(odd)} {name} are no integers: {listed(map(repr, odd))}',
                'number them, and the annotations that refer to them, by integers',
            )
        repeated = [value for value, count in Counter(map(repr, ids)).items() if count > 1]
        if repeated:
            advice = {
                'images': 'give each image an id of its own, and its annotations that image_id',
                'annotations': 'number the annotations from 1 to the last, over all images',
                'categories': 'give each category an id of its own',
            }[name]
            lost = 'MMDetection stops' if name == 'annotations' else 'the last one replaces the others'
            findings.add(ERROR, f'ids of {name} repeat, and {lost}: {listed(repeated)}', advice)
    if evaluated and any(annotation.get('id') == 0 for annotation in content['annotations']):
        findings.add(
            NOTE,
            "an annotation has the id 0: COCO's evaluation never counts it as found",
            'number the annotations from 1 on',
        )
    return usable


def _check_names(content: dict, findings: Findings, classes: Sequence[str], own_classes: bool) -> None:
    """Checks that every class is the name of one category, and in which order."""
    categories = content['categories']
    used = Counter(annotation['category_id'] for annotation in content['annotations'] if _hashable(annotation))
    odd = [category['name'] for category in categories if not isinstance(category['name'], str)]
    if odd:
        findings.add(
            ERROR, f'names of {len(odd)} categories are no text: {listed(map(repr, odd))}', 'put them in quotes'
        )
        return
    by_name = defaultdict(list)
    for category in categories:
        by_name[category['name']].append(category['id'])

    missing = [name for name in classes if name not in by_name]
    if missing and not own_classes:
        labelled = [category['name'] for category in categories if used[category['id']]]
        findings.add(
            ERROR,
            f'the config names no classes, so they are the {len(classes)} of COCO; the file has {len(by_name)} '
            f'categories: {listed(map(repr, by_name))}',
            f'add metainfo=dict(classes={tuple(labelled)!r}) to every data set',
        )
    elif missing:
        near = {name: _nearest(name, list(by_name)) for name in missing}
        hints = [f'{near[name]!r} for {name!r}' for name in missing if near[name]]
        findings.add(
            ERROR,
            f'no category has the name {listed(map(repr, missing))}; the file has {listed(map(repr, by_name), 8)}'
            + ('' if len(missing) == len(classes) else ': the classes after it would move up by one'),
            f'write {listed(hints)}' if hints else 'write the names of the categories, to the letter',
        )
    for name in dict.fromkeys(classes):
        ids = by_name.get(name, [])
        if len(ids) < 2:
            continue
        empty = [category_id for category_id in ids if not used[category_id]]
        roboflow = 0 in empty and len(empty) == len(ids) - 1
        findings.add(
            ERROR,
            f'{len(ids)} categories have the name {name!r}, with the ids {listed(ids)}: labels move up by one',
            'delete category 0 from the file: Roboflow adds it, and no annotation has it'
            if roboflow
            else 'make them one category, or give them different names',
        )

    if missing or any(len(ids) > 1 for ids in by_name.values()):
        return
    in_file = [category['name'] for category in categories if category['name'] in classes]
    if in_file != list(classes):
        index = next(index for index, name in enumerate(classes) if in_file[index] != name)
        findings.add(
            WARNING,
            f'the classes are in another order than the categories, from {classes[index]!r} on: MMDetection numbers '
            'by the file, so pictures and logs will show wrong names',
            f'classes=({listed(map(repr, in_file), 12)})',
        )
    others = [category for category in categories if category['name'] not in classes and used[category['id']]]
    if others:
        count = sum(used[category['id']] for category in others)
        findings.add(
            NOTE,
            f'{count} objects of {len(others)} other categories are left out: '
            + listed(repr(category['name']) for category in others),
            'add these names to classes, if they are to be learned',
        )


def _nearest(name: str, names: list[str]) -> str | None:
    """Returns the name that was probably meant."""
    plain = {other.strip().casefold(): other for other in names}
    wanted = name.strip().casefold()
    if wanted in plain:
        return plain[wanted]
    close = get_close_matches(wanted, plain, n=1)
    return plain[close[0]] if close else None


def _hashable(annotation: dict) -> bool:
    return not isinstance(annotation.get('category_id'), (list, dict))


def _check_images(images: list[dict], findings: Findings) -> set:
    """Checks sizes and names; returns the ids of images that have an address for a name."""
    sizes = [image for image in images if not all(_is_size(image[key]) for key in ('height', 'width'))]
    if sizes:
        image = sizes[0]
        findings.add(
            ERROR,
            f'{len(sizes)} of {len(images)} images have a size that is no number above 0, such as '
            f'{image["width"]!r} x {image["height"]!r} of {image["file_name"]!r}',
            'write width and height of the image file, in pixels',
        )
    odd = [image['file_name'] for image in images if not isinstance(image['file_name'], str) or not image['file_name']]
    if odd:
        findings.add(
            ERROR,
            f'file_name of {len(odd)} of {len(images)} images is no text, such as {odd[0]!r}',
            'write the name of the image file, from the folder of data_prefix on',
        )
    remote = [image for image in images if str(image['file_name']).startswith(('http://', 'https://'))]
    if remote:
        findings.add(
            ERROR,
            f'file_name of {len(remote)} of {len(images)} images is an address, such as {remote[0]["file_name"]!r}, '
            'which MMDetection takes for a path',
            'download the images, and write their names in the folder of data_prefix',
        )
    names = Counter(str(image['file_name']) for image in images)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        findings.add(
            WARNING,
            f'{len(repeated)} files are listed more than once, each time with a part of their objects: '
            + listed(repeated),
            'list each file once, and give all of its annotations that image_id',
        )
    return {image['id'] for image in remote}


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_annotations(content: dict, findings: Findings, masks: bool) -> set:
    annotations = content['annotations']
    total = len(annotations)
    sizes = {
        repr(image['id']): (image['width'], image['height'], str(image['file_name'])) for image in content['images']
    }
    categories = {repr(category['id']) for category in content['categories']}
    faults = defaultdict(list)
    seen = set()
    for annotation in annotations:
        place = repr([annotation[key] for key in ('image_id', 'category_id', 'bbox')])
        if place in seen:
            faults['copy'].append(annotation)
        seen.add(place)
        size = sizes.get(repr(annotation['image_id']))
        if size is None:
            faults['image'].append(annotation)
        if repr(annotation['category_id']) not in categories:
            faults['category'].append(annotation)
        if size is None or not (_is_size(size[0]) and _is_size(size[1])):
            continue
        fault = _box_fault(annotation, *size[:2])
        if fault:
            faults[fault].append(annotation)
        if masks:
            fault = _mask_fault(annotation.get('segmentation'), annotation['bbox'], *size[:2])
            if fault:
                faults[fault].append(annotation)

    boxes = [annotation['bbox'] for annotation in annotations if _is_box(annotation['bbox'])]
    relative = bool(boxes) and all(max(box) <= 1 for box in boxes)
    corners = bool(boxes) and all(
        (size := sizes.get(repr(annotation['image_id']))) is not None
        and _is_size(size[0])
        and _is_size(size[1])
        and _is_box(annotation['bbox'])
        and annotation['bbox'][0] < annotation['bbox'][2] <= size[0] + BOX_TOLERANCE
        and annotation['bbox'][1] < annotation['bbox'][3] <= size[1] + BOX_TOLERANCE
        for annotation in annotations
    )
    for fault, found in faults.items():
        level, text, advice = FAULTS[fault]
        if fault in ('tiny', 'beyond', 'outside') and relative:
            level, advice = ERROR, 'the boxes are fractions of the image: multiply them by its width and height'
        elif fault in ('beyond', 'outside') and corners:
            level, advice = ERROR, 'the boxes look like [left, top, right, bottom]: write [left, top, width, height]'
        findings.add(
            level or by_share(len(found), total),
            f'{len(found)} of {total} annotations {text}: ids {listed(entry["id"] for entry in found)}',
            advice,
            dict.fromkeys(
                sizes[repr(entry['image_id'])][2] for entry in found[:50] if repr(entry['image_id']) in sizes
            ),
        )

    crowd = [entry for entry in annotations if entry.get('iscrowd') or entry.get('ignore')]
    if len(crowd) > total / 2:
        every = 'all' if len(crowd) == total else f'{len(crowd)} of'
        findings.add(
            ERROR if len(crowd) == total else WARNING,
            f'{every} {total} annotations are marked iscrowd (or ignore), which are never learned',
            'set iscrowd to 0 (labelling tools set 1 for brush masks); the masks may stay as they are',
        )
    odd = [entry for entry in annotations if 'iscrowd' in entry and entry['iscrowd'] not in (0, 1)]
    if odd:
        findings.add(
            by_share(len(odd), total),
            f'iscrowd of {len(odd)} annotations is neither 0 nor 1, such as {odd[0]["iscrowd"]!r}, and counts as 1 '
            'unless it is empty',
            'write the number 0 or 1',
        )
    return {annotation['image_id'] for annotation in faults['coordinate']}


FAULTS = {
    'image': (
        None,
        'belong to no image of the file (image_id) and are left out',
        "compare annotations' image_id with images' id: both must be the same number, not text",
    ),
    'category': (
        None,
        'belong to no category of the file (category_id) and are left out',
        "compare annotations' category_id with categories' id: both must be the same number, not text",
    ),
    'box': (ERROR, 'have a bbox that is not four finite numbers', 'write [left, top, width, height] in pixels'),
    'area': (ERROR, 'have an area that is no finite number', 'write the area in pixels'),
    'no area': (
        None,
        'have an area of 0 or less and are left out',
        "write the box's width times height, or the mask's number of pixels",
    ),
    'tiny': (
        None,
        'have a box of less than one pixel in width or height (or a negative one) and are left out',
        'correct the boxes [left, top, width, height] in pixels, or delete them',
    ),
    'outside': (
        None,
        'have a box that lies outside of the image and are left out',
        'correct the boxes [left, top, width, height]: is the image another size than when it was labelled?',
    ),
    'beyond': (
        None,
        f'have a box that reaches beyond the image by more than {BOX_TOLERANCE:.0f} pixels',
        'correct the boxes [left, top, width, height]: is the image another size than when it was labelled?',
    ),
    'copy': (
        WARNING,
        'repeat another one (image, category and box), and of two objects in one place one is never found',
        'delete the copies: files that were put together, or an export that was added to itself?',
    ),
    'no mask': (
        ERROR,
        "have no 'segmentation', or an empty one, and masks are to be learned: MMDetection stops",
        'label masks; for boxes alone take a detector without masks (docs/own_data.md, "Boxes without masks")',
    ),
    'flat polygon': (
        ERROR,
        "have a 'segmentation' that is one list of numbers: MMDetection stops",
        'put each polygon into a list of its own: [[x1, y1, x2, y2, …]]',
    ),
    'mask': (
        ERROR,
        "have a 'segmentation' that is neither polygons nor a run-length code",
        "write [[x1, y1, x2, y2, …]] or {'size': [height, width], 'counts': …}",
    ),
    'polygon': (
        None,
        'have no polygon of three points or more and are left out',
        'write three points or more, as [[x1, y1, x2, y2, x3, y3, …]]; a box is four',
    ),
    'part': (
        WARNING,
        'have polygons of under three points or an odd number of coordinates beside others, which are left out',
        'delete the short polygons, or correct them',
    ),
    'coordinate': (
        ERROR,
        'have polygons with coordinates that are no finite numbers or far away: loading them takes all memory',
        'write x and y in pixels of the image',
    ),
    'code size': (
        ERROR,
        'have a run-length code of another size than the image',
        "write 'size': [height, width] of the image, and counts that fit it",
    ),
    'apart': (
        None,
        'have a mask somewhere else than their box',
        'compute both for the same size of the image; a box is [left, top, width, height], a polygon [x1, y1, …]',
    ),
}
"""For each fault of an annotation its level (None: by its share), and what to say and advise."""


def _is_box(box: object) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_number, box))


def _box_fault(annotation: dict, width: float, height: float) -> str | None:
    """Returns what is wrong with the box, in the order in which MMDetection would find it."""
    box, area = annotation['bbox'], annotation['area']
    if not _is_box(box):
        return 'box'
    if not _is_number(area):
        return 'area'
    left, top, w, h = box
    if w < 1 or h < 1:
        return 'tiny'
    if left >= width or top >= height or left + w <= 0 or top + h <= 0:
        return 'outside'
    if area <= 0:
        return 'no area'
    if max(-left, -top, left + w - width, top + h - height) > BOX_TOLERANCE:
        return 'beyond'
    return None


def _mask_fault(mask: object, box: object, width: float, height: float) -> str | None:
    """Returns what is wrong with a mask, in the order in which MMDetection would find it."""
    if not mask:
        return 'no mask'
    if isinstance(mask, dict):
        return _code_fault(mask, width, height)
    if not isinstance(mask, list):
        return 'mask'
    if any(_is_number(part) for part in mask):
        return 'flat polygon'
    if not all(isinstance(part, list) for part in mask):
        return 'mask'
    whole = [part for part in mask if len(part) >= 6 and len(part) % 2 == 0]
    if not whole:
        return 'polygon'
    farthest = FAR * max(width, height)
    if not all(_is_number(value) and abs(value) < farthest for part in whole for value in part):
        return 'coordinate'
    if len(whole) < len(mask):
        return 'part'
    if _is_box(box) and _overlap(whole, box) < 0.3:
        return 'apart'
    return None


def _code_fault(mask: dict, width: float, height: float) -> str | None:
    counts, size = mask.get('counts'), mask.get('size')
    if not isinstance(counts, (list, str)) or not isinstance(size, list) or len(size) != 2:
        return 'mask'
    if isinstance(counts, list) and not all(_is_number(count) and count >= 0 for count in counts):
        return 'mask'
    if list(size) != [height, width] or (isinstance(counts, list) and sum(counts) != height * width):
        return 'code size'
    return None


def _overlap(polygons: list[list[float]], box: Sequence[float]) -> float:
    """Returns the intersection over union of a box and the polygons' own, each at least four pixels wide and high."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    sides, areas = [], [1.0, 1.0]
    for values, start, length in ((xs, box[0], box[2]), (ys, box[1], box[3])):
        low, high = min(values) - 2, max(values) + 2
        first, last = start - 2, start + length + 2
        sides.append(max(0.0, min(high, last) - max(low, first)))
        areas = [areas[0] * (high - low), areas[1] * (last - first)]
    both = sides[0] * sides[1]
    return both / (areas[0] + areas[1] - both)
