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
from pathlib import Path

import yaml

METAFILE = Path(__file__).resolve().parents[1] / 'configs' / 'metafile.yml'
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
    models = yaml.safe_load(METAFILE.read_text())['Models']
    for model in models:
        if Path(model['Config']).name == Path(config).name:
            return {name: value for result in model['Results'] for name, value in result['Metrics'].items()}
    known = ', '.join(Path(model['Config']).name for model in models)
    raise KeyError(f'{config}: no published result; those of {known} are known')


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the test run')
    parser.add_argument('json', type=Path, help='JSON file of metrics in the work directory of the test run')
    parser.add_argument('--tta', action='store_true', help='the run was one with --tta: compare multi-scale results')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=0.1,
        help='in points; 0.1 (the default) covers the rounding of the published table and a test of published weights, '
        'retraining varies by about 0.3',
    )
    args = parser.parse_args()
    try:
        published, measured = published_metrics(args.config), measured_metrics(args.json)
    except (OSError, ValueError, KeyError) as error:
        print(f'check_results: {error.args[0] if isinstance(error, KeyError) else error}', file=sys.stderr)
        return 2
    published.pop(SINGLE_SCALE if args.tta else MULTI_SCALE, None)

    missing = [METRICS[name] for name in published if METRICS[name] not in measured]
    if missing:
        print(
            f'check_results: {args.json}: expected {", ".join(missing)}, found {", ".join(measured)}', file=sys.stderr
        )
        return 2
    reached = True
    for name, expected in published.items():
        found = measured.pop(METRICS[name])
        within = found >= expected - args.tolerance
        reached &= within
        verdict = 'within' if within else 'NOT within'
        print(f'{name}: {found:.2f}, published {expected:.1f}, {verdict} {args.tolerance} points below or better')
    for name, found in measured.items():
        print(f'{name}: {found:.2f}, not published')
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
