"""Tests published models and compares the results with the published figures.

Example:
    python tools/reproduce.py mask_rcnn_sm_t
    python tools/reproduce.py all --data /datasets --gpus 8

For each model: its weights are fetched (`spatialmamba://NAME`; a folder named by MMSPATIALMAMBA_WEIGHTS comes first),
the toolbox's own test script runs with the model's config, and the metrics are compared as tools/check_results.py does.
Where multi-scale results were published, a second run with --tta follows. The data sets lie below one folder as the
toolboxes' configs have it: coco, ade/ADEChallengeData2016, imagenet.

Exits with 0 if every published metric is reached within the tolerance, with 1 if one is not or a test could not be run,
with 2 on bad input.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from check_results import MULTI_SCALE, Comparison, add_tolerance, compare, measured_metrics
from mmengine.config import Config

from mmspatialmamba import config_path
from mmspatialmamba.download import DownloadError
from mmspatialmamba.published import SCHEMES, PublishedModel, find_model, find_weights, published_models

DATA = 'data/'
"""What the paths of all data sets begin with in the configs of the toolboxes."""


class RunError(RuntimeError):
    """A test could not be run."""


def select(names: list[str]) -> list[PublishedModel]:
    """Returns the models of a command line: names with the scheme or without it, or all.

    Raises:
        KeyError: There is no such model.
    """
    if names == ['all']:
        return list(published_models().values())
    known = {model.short_name: model for model in published_models().values()}
    return [known.get(name) or find_model(name if '://' in name else f'{SCHEMES[0]}://{name}') for name in names]


def with_data(value: object, folder: Path) -> object:
    """Returns a part of a config whose paths of data begin with another folder."""
    if isinstance(value, dict):
        return {key: with_data(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_data(inner, folder) for inner in value]
    if isinstance(value, str) and value.startswith(DATA):
        return f'{folder}/{value.removeprefix(DATA)}'
    return value


def run_test(model: PublishedModel, weights: Path, args: argparse.Namespace, tta: bool) -> list[Comparison]:
    """Runs the toolbox's test of a model and compares its metrics.

    Raises:
        RunError: The test fails, or writes no metrics.
    """
    config = Config.fromfile(config_path(model.config))
    for part in ('test_dataloader', 'test_evaluator'):
        config[part] = with_data(config[part].to_dict(), args.data)
    work_dir = args.work_dir / (model.short_name + '_tta' * tta)
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / model.config
    config.dump(path)

    toolbox = Path(importlib.util.find_spec(config.default_scope).origin).parent
    command = [str(toolbox / '.mim' / 'tools' / 'test.py'), str(path), str(weights), '--work-dir', str(work_dir)]
    if args.gpus > 1:
        command = ['-m', 'torch.distributed.run', '--nproc-per-node', str(args.gpus), *command, '--launcher', 'pytorch']
    if tta:
        command.append('--tta')
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    before = set(work_dir.glob('*/*.json'))
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        raise RunError(f'the test of {config.default_scope} ended with status {code}, its output is above')
    written = sorted(set(work_dir.glob('*/*.json')) - before)
    if not written:
        raise RunError(f'the test wrote no metrics into {work_dir}')
    return compare(model.metrics, measured_metrics(written[-1]), tta, args.tolerance)


def reproduce(model: PublishedModel, args: argparse.Namespace) -> list[Comparison]:
    """Fetches the weights of a model and compares every published metric.

    Raises:
        DownloadError: The weights cannot be had.
        RunError: A test fails, or writes no metrics.
        ValueError: A test lacks a published metric.
    """
    weights = find_weights(model)
    runs = (False, True) if MULTI_SCALE in model.metrics and not args.single_scale else (False,)
    return [comparison for tta in runs for comparison in run_test(model, weights, args, tta)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='NAME', help='published models by name, or all')
    parser.add_argument('--data', type=Path, default=Path('data'), help='folder of the data sets (default: data)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/reproduce'), help='where the runs write')
    parser.add_argument('--gpus', type=int, default=1, help='number of processes, a GPU each (default: 1)')
    parser.add_argument('--single-scale', action='store_true', help='leave the runs with --tta out')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='for the test script, such as batch sizes'
    )
    add_tolerance(parser)
    args = parser.parse_args()
    try:
        models = select(args.models)
    except KeyError as error:
        print(f'reproduce: {error.args[0]}', file=sys.stderr)
        return 2
    if not args.data.is_dir():
        print(f'reproduce: --data: expected the folder of the data sets, found none at {args.data}', file=sys.stderr)
        return 2

    lines, reached = [], True
    for model in models:
        try:
            results = reproduce(model, args)
        except (DownloadError, RunError, ValueError) as error:
            lines.append(f'{model.short_name}: not compared: {error}')
            reached = False
            continue
        lines += [f'{model.short_name}: {comparison}' for comparison in results]
        reached &= all(comparison.reached for comparison in results)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    print('\n'.join([f'PyTorch {torch.__version__}, {device}', *lines]))
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
