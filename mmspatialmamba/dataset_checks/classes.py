"""The names of the classes in a config."""

from collections import Counter

from .findings import ERROR, WARNING, Findings, listed

KNOWN_KEYS = ('classes', 'palette')


def check_classes(findings: Findings, classes: object, metainfo: dict, palette_level: str) -> None:
    """Checks the classes that a data set has, and the ``metainfo`` of its config.

    Args:
        findings: Where findings go.
        classes: What the data set takes for its classes, None if it has none.
        metainfo: ``metainfo`` of the data set's config, empty if there is none.
        palette_level: Level of a palette of another length than the classes: MMSegmentation stops at it, MMDetection
            does not train with it.
    """
    for key in metainfo:
        if key not in KNOWN_KEYS and key.lower().rstrip('s') in ('class', 'classe', 'name', 'class_name', 'palette'):
            right = 'palette' if 'palette' in key.lower() else 'classes'
            findings.add(
                ERROR if right == 'classes' else WARNING,
                f'metainfo has the key {key!r}, which nothing reads',
                f'rename it to {right!r}',
            )
    if classes is None:
        findings.add(ERROR, 'the data set has no classes', "add metainfo=dict(classes=('name', …)) to the data set")
        return
    if isinstance(classes, str):
        findings.add(
            ERROR,
            f'classes is the text {classes!r}: it counts as {len(classes)} classes of one letter each',
            f'write a tuple with a comma, classes=({classes!r},)',
        )
        return
    if not isinstance(classes, (list, tuple)) or not classes:
        findings.add(ERROR, f'classes is {classes!r}', "write a tuple of names, classes=('name', …)")
        return
    other = [name for name in classes if not isinstance(name, str)]
    if other:
        findings.add(ERROR, f'these of the classes are no text: {listed(map(repr, other))}', 'put them in quotes')
    repeated = [name for name, count in Counter(map(str, classes)).items() if count > 1]
    if repeated:
        findings.add(ERROR, f'classes has {listed(map(repr, repeated))} more than once', 'give each class one name')
    palette = metainfo.get('palette')
    if palette is not None and len(palette) != len(classes):
        findings.add(
            palette_level,
            f'palette has {len(palette)} colours for {len(classes)} classes',
            'give one colour (red, green, blue) for each class, or leave palette out',
        )
