"""Compares the metrics of a test run with the published results of its config.

Example:
    mim test mmdet configs/mask_rcnn_sm_t.py --checkpoint FILE --work-dir work_dirs/test
    python tools/check_results.py configs/mask_rcnn_sm_t.py work_dirs/test/20261121_120000/20261121_120000.json

Exits with 0 if every published metric is reached within the tolerance, with 1 if one is not, with 2 on bad input.
Metrics that were not published (AP by size, say) are printed without a verdict.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from mmspatialmamba.published import published_models

SINGLE_SCALE, MULTI_SCALE = 'mIoU', 'mIoU(ms+flip)'
METRICS = {
    'box AP': 'coco/bbox_mAP',
    'mask AP': 'coco/segm_mAP',
    'Top 1 Accuracy': 'accuracy/top1',
    SINGLE_SCALE: 'mIoU',
    MULTI_SCALE: 'mIoU',
}
"""Published metric and the name that a test run gives it."""
FRACTIONS = ('coco/',)
"""Metrics whose names begin so are fractions in a test run and percentages in print."""


def published_metrics(config: str) -> dict[str, float]:
    """Returns the published metrics of a config, in per cent.

    Raises:
        KeyError: No published model has this config.
    """
    models = published_models().values()
    for model in models:
        if model.config == Path(config).name:
            return model.metrics
    raise KeyError(f'{config}: no published result; those of {", ".join(model.config for model in models)} are known')


def measured_metrics(path: Path) -> dict[str, float]:
    """Returns the metrics of a test run, in per cent.

    Raises:
        ValueError: The file holds no metrics.
    """
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not values:
        raise ValueError(f'{path}: expected the JSON object of metrics that mim test writes, found {str(values)[:60]}')
    return {
        name: 100 * value if name.startswith(FRACTIONS) and value >= 0 else value
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


@dataclass(frozen=True)
class Comparison:
    """A published metric beside the measured one, in per cent.

    Attributes:
        name: Name of the published metric.
        published: Published value.
        measured: Measured value.
        tolerance: How many points below are allowed.
    """

    name: str
    published: float
    measured: float
    tolerance: float

    @property
    def reached(self) -> bool:
        """Whether the published value is reached within the tolerance."""
        return self.measured >= self.published - self.tolerance

    def __str__(self) -> str:
        verdict = 'within' if self.reached else 'NOT within'
        return (
            f'{self.name}: {self.measured:.2f}, published {self.published:.1f}, {verdict} {self.tolerance} points '
            'below or better'
        )


def compare(published: dict[str, float], measured: dict[str, float], tta: bool, tolerance: float) -> list[Comparison]:
    """Compares what was published with what a test run measured.

    Args:
        published: Published metrics of a model, in per cent.
        measured: Metrics of the test run under its own names, in per cent.
        tta: Whether the run was one with test-time augmentation.
        tolerance: How many points below are allowed.

    Raises:
        ValueError: The run lacks a published metric.
    """
    other = SINGLE_SCALE if tta else MULTI_SCALE
    published = {name: value for name, value in published.items() if name != other}
    missing = [METRICS[name] for name in published if METRICS[name] not in measured]
    if missing:
        raise ValueError(f'expected {", ".join(missing)}, found {", ".join(measured)}')
    return [Comparison(name, value, measured[METRICS[name]], tolerance) for name, value in published.items()]


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--tolerance``."""
    parser.add_argument(
        '--tolerance',
        type=float,
        default=0.1,
        help='in points; 0.1 (the default) covers the rounding of the published table and a test of published weights, '
        'retraining varies by about 0.3',
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the test run')
    parser.add_argument('json', type=Path, help='JSON file of metrics in the work directory of the test run')
    parser.add_argument('--tta', action='store_true', help='the run was one with --tta: compare multi-scale results')
    add_tolerance(parser)
    args = parser.parse_args()
    try:
        published, measured = published_metrics(args.config), measured_metrics(args.json)
    except (OSError, ValueError, KeyError) as error:
        print(f'check_results: {error.args[0] if isinstance(error, KeyError) else error}', file=sys.stderr)
        return 2
    try:
        comparisons = compare(published, measured, args.tta, args.tolerance)
    except ValueError as error:
        print(f'check_results: {args.json}: {error}', file=sys.stderr)
        return 2
    for comparison in comparisons:
        print(comparison)
    for name, found in measured.items():
        if name not in {METRICS[comparison.name] for comparison in comparisons}:
            print(f'{name}: {found:.2f}, not published')
    return 0 if all(comparison.reached for comparison in comparisons) else 1


if __name__ == '__main__':
    sys.exit(main())
