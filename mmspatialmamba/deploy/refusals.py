"""What a whole detector's file cannot do is refused by name, before anything is exported."""

from collections.abc import Sequence

from torch import nn


class CannotExport(ValueError):
    """A model has a part that a file of standard operators cannot hold, or that nobody wrote for it."""


def require_methods(place: str, module: nn.Module, owners: Sequence[type], names: Sequence[str]) -> None:
    """Raises unless a module's methods are those of the classes whose computation was written for the file.

    Args:
        place: Name of the module within its model, for the error.
        module: A module of mmdet.
        owners: Classes whose methods are known.
        names: Methods that have to be theirs.

    Raises:
        CannotExport: A method is another one.
    """
    expected = ' or '.join(owner.__name__ for owner in owners)
    for name in names:
        known = [getattr(owner, name) for owner in owners if hasattr(owner, name)]
        if getattr(type(module), name, None) not in known:
            raise CannotExport(
                f'{place}: expected a head that predicts as {expected} does, found {type(module).__name__}, whose '
                f'{name} is another'
            )


def require_type(place: str, value: object, expected: type) -> None:
    """Raises `CannotExport` unless the value is of this very class: a subclass may compute something else."""
    if type(value) is not expected:
        raise CannotExport(f'{place}: expected {expected.__name__}, found {type(value).__name__}')


def require(place: str, expected: str, found: object, holds: bool) -> None:
    """Raises `CannotExport` unless a condition holds, with what was expected and found at that place."""
    if not holds:
        raise CannotExport(f'{place}: expected {expected}, found {found}')


def read_count(place: str, cfg: dict, name: str) -> int:
    """Returns a limit of the test config, which has to be positive: the file has that many rows."""
    count = cfg.get(name, -1)
    require(f'{place}.{name}', 'a positive number of rows', count, count > 0)
    return count


def read_suppression(place: str, cfg: dict) -> float:
    """Returns the IoU above which a box is suppressed by a better one of its class.

    Raises:
        CannotExport: Another suppression is asked for, such as a soft one, for which ONNX has no operator.
    """
    options = dict(cfg.get('nms') or {})
    found = options.pop('type', 'nms' if options else None)
    require(f'{place}.nms.type', 'nms', found, found == 'nms')
    threshold = options.pop('iou_threshold', None)
    require(f'{place}.nms.iou_threshold', 'a number', threshold, isinstance(threshold, (int, float)))
    options.pop('split_thr', None)  # splits the work, not the result
    agnostic = options.pop('class_agnostic', False)
    require(f'{place}.nms.class_agnostic', 'False', agnostic, not agnostic)
    require(f'{place}.nms', 'no options but iou_threshold', ', '.join(options), not options)
    return float(threshold)
