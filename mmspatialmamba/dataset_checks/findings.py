"""A finding: what is wrong, how much it matters, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = 'error', 'warning', 'note'
"""Training cannot work; training works, but part of the data is not used or is wrong; worth to know."""

LEVELS = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its owner should know.

    Attributes:
        level: One of `LEVELS`.
        source: The data set, such as 'train'.
        text: What was found, with numbers and examples.
        advice: What to do about it, one line.
        images: Paths of some images that show it.
    """

    level: str
    source: str
    text: str
    advice: str
    images: tuple[str, ...] = ()


class Findings(list):
    """The findings of one data set."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source

    def add(self, level: str, text: str, advice: str, images: Iterable[str] = ()) -> None:
        """Adds a finding; of ``images``, some are kept."""
        self.append(Finding(level, self.source, text, advice, tuple(list(images)[:4])))

    @property
    def has_error(self) -> bool:
        """Whether training cannot work."""
        return any(finding.level == ERROR for finding in self)


def listed(values: Iterable, limit: int = 4) -> str:
    """Returns the first of some values as text, and how many more there are."""
    values = list(values)
    text = ', '.join(str(value) for value in values[:limit])
    return text if len(values) <= limit else f'{text} and {len(values) - limit} more'


def by_share(count: int, total: int) -> str:
    """Returns the level of a fault that spoils ``count`` of ``total`` items: an error from half of them on."""
    return ERROR if 2 * count >= total else WARNING
