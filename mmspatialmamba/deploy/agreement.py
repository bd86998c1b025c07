"""How far the detections of two programs lie apart."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Largest differences between what two programs found.

    Attributes:
        detections: Number of detections that were compared.
        same: Whether count and labels are the same.
        box: Largest difference of a corner, in pixels.
        score: Largest difference of a score.
        pixels: Largest number of different mask pixels in an image.
    """

    detections: int = 0
    same: bool = True
    box: float = 0.0
    score: float = 0.0
    pixels: int = 0

    def holds(self, box: float, score: float, pixels: int) -> bool:
        """Returns whether labels are the same and no difference is above its limit."""
        return self.same and self.box <= box and self.score <= score and self.pixels <= pixels

    def __str__(self) -> str:
        if not self.same:
            return 'another count or other labels'
        return f'boxes {self.box:.1e} pixel, scores {self.score:.1e}, masks {self.pixels} pixels per image'


def worst(agreements: Iterable[Agreement]) -> Agreement:
    """Returns the largest differences over images."""
    agreements = list(agreements)
    return Agreement(
        sum(one.detections for one in agreements),
        all(one.same for one in agreements),
        max((one.box for one in agreements), default=0.0),
        max((one.score for one in agreements), default=0.0),
        max((one.pixels for one in agreements), default=0),
    )


def compare(found, expected) -> Agreement:
    """Compares detections of an image as sets: ties may come in any order.

    Args:
        found: Has ``boxes`` (K, 4), ``scores`` (K,), ``labels`` (K,) and ``masks`` (K, H, W) or None, NumPy arrays.
        expected: The same of the program that is right.
    """
    if not np.array_equal(np.sort(found.labels), np.sort(expected.labels)):
        return Agreement(max(len(found.labels), len(expected.labels)), same=False)
    box = score = 0.0
    pixels = 0
    left = list(range(len(found.labels)))
    for index, label in enumerate(expected.labels):
        same = [other for other in left if found.labels[other] == label]
        apart = [
            abs(found.boxes[other] - expected.boxes[index]).max() + abs(found.scores[other] - expected.scores[index])
            for other in same
        ]
        partner = same[int(np.argmin(apart))]
        left.remove(partner)
        box = max(box, float(abs(found.boxes[partner] - expected.boxes[index]).max()))
        score = max(score, float(abs(found.scores[partner] - expected.scores[index])))
        if expected.masks is not None:
            pixels += int((found.masks[partner] != expected.masks[index]).sum())
    return Agreement(len(expected.labels), True, box, score, pixels)
