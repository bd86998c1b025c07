"""Swaps the backbone of every config of the installed toolboxes, runs the result, and writes the table.

For each config: whether it builds as it is (without its weights), and whether it builds and computes features
(detectors), a prediction (segmentors) or logits (classifiers) with a very small backbone of this package. Configs with
the same model are run once.

    python tools/sweep_zoo.py mmdet mmseg mmpretrain --jobs 2 --out docs/zoo_coverage.md
    python tools/sweep_zoo.py mmdet mmseg --backbone VMamba --out work_dirs/zoo_coverage_vmamba.md

A toolbox that is not installed is refused by name: mmpose, mmrotate and mmyolo need what docs/other_toolboxes.md says.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope

from mmspatialmamba import swap_backbone

ROOT = Path(__file__).parents[1]
SMALL = {
    'SpatialMamba': {'embed_dims': 32, 'depths': (1, 1, 1, 1)},
    'VMamba': {'embed_dims': 32, 'depths': (1, 1, 1, 1), 'ssm_ratio': 1},
}
"""Architecture of the very small model of each backbone."""

DISTRIBUTIONS = {
    'mmdet': 'mmdet',
    'mmseg': 'mmsegmentation',
    'mmpretrain': 'mmpretrain',
    'mmpose': 'mmpose',
    'mmrotate': 'mmrotate',
    'mmyolo': 'mmyolo',
}
INTRODUCTION = """# Zoo coverage

`mmspatialmamba.swap_backbone(cfg, arch='tiny')` puts Spatial-Mamba into any config of MMDetection, MMSegmentation and
MMPretrain, and with `backbone='VMamba'` VMamba:

```python
from mmengine.config import Config
from mmspatialmamba import swap_backbone

cfg = swap_backbone(Config.fromfile('atss_r50_fpn_1x_coco.py'), arch='tiny', pretrained='spatialmamba://cls_sm_t')
cfg.dump('atss_sm_t.py')
```

Its docstring says what changes. Learning rate and optimizer stay those of the former backbone, which is rarely what a
Spatial-Mamba should be trained with: compare `configs/`. With `pretrained`, images are normalized as ImageNet weights
expect it (configs whose names hold `caffe` or `yolo` have other values), and the log says what changed.

The tables are written by `python tools/sweep_zoo.py mmdet mmseg mmpretrain`: configs with a model, how many of them
build unswapped on the machine of the sweep (without weights), how many work with a backbone of 32 channels and one
block per stage (Spatial-Mamba; `--backbone VMamba` tries the other), and what was run of these after the swap. Weights
are random: no accuracy is claimed.
"""


def configs_of(toolbox: str) -> Path:
    """Returns the folder of the configs that come with an installed toolbox."""
    return Path(importlib.util.find_spec(toolbox).origin).parent / '.mim' / 'configs'


def without_weights(value: object) -> object:
    """Returns a config's value without what names weights, so that equal models compare equal."""
    if isinstance(value, dict):
        return {k: without_weights(v) for k, v in value.items() if k not in ('init_cfg', 'pretrained')}
    if isinstance(value, (list, tuple)):
        return type(value)(without_weights(v) for v in value)
    return value


def in_one_line(error: Exception) -> str:
    """Returns the type and the first line of an error, with what names this machine left out."""
    text = str(error).strip().partition('\n')[0] if str(error).startswith('swap_backbone') else str(error)
    text = re.sub(r'(?<=[\'" ])/\S*/', '', ' '.join(text.split()))[:200]
    return text if text.startswith('swap_backbone') else f'{type(error).__name__}: {text}'


def build(cfg: Config) -> torch.nn.Module:
    """Builds the model of a config, in evaluation mode."""
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = MODELS.build(cfg.model)
    model.eval()
    return model


@torch.no_grad()
def compute(model: torch.nn.Module, in_channels: int) -> str:
    """Computes a prediction of a segmentor, logits of a classifier, or the features of others, and says which."""
    if hasattr(model, 'decode_head'):
        model.predict(torch.rand(1, in_channels, 128, 128))
        return 'prediction'
    side = 384  # for all: FPG divides it by 128, Sparse R-CNN and DINO select hundreds of positions
    image = torch.rand(1, in_channels, side, side)
    if type(model).__name__.endswith('Classifier'):
        model(image, mode='tensor')
        return 'logits'
    model = next((getattr(model, part) for part in ('detector', 'student') if hasattr(model, part)), model)
    maps = model.extract_feat(image) if hasattr(model, 'extract_feat') else model.backbone(image)
    run = 'features'
    for head in (getattr(model, name, None) for name in ('panoptic_head', 'track_head')):
        if hasattr(head, 'pixel_decoder'):  # the neck of Mask2Former and MaskFormer
            meta = {'batch_input_shape': (side, side), 'img_shape': (side, side)}
            decoder = head.pixel_decoder
            decoder(maps, [meta]) if 'MaskFormer' in type(head).__name__ else decoder(maps)
            run = 'features and pixel decoder'
    return run


def run(path: Path, backbone: str) -> dict:
    """Tries one config and returns what came of it: 'ok' or the reason, unswapped and swapped."""
    cfg = Config.fromfile(path)
    result = {}
    # The former model's initial values do not matter, and they take most of the time.
    initializers = {name: mock.DEFAULT for name in dir(torch.nn.init) if name.endswith('_') and name[0] != '_'}
    with mock.patch.multiple(torch.nn.init, **initializers):
        unswapped = Config({'model': without_weights(cfg.model), 'default_scope': cfg.get('default_scope')})
        try:
            build(unswapped)
            result['unswapped'] = 'ok'
        except Exception as error:
            result['unswapped'] = in_one_line(error)
        try:
            swapped = swap_backbone(cfg, SMALL[backbone], backbone=backbone)
        except ValueError as error:
            return {**result, 'swapped': in_one_line(error)}
    try:
        part = swapped.model.get('detector', swapped.model)
        result['run'] = compute(build(swapped), part.backbone.get('in_channels', 3))
        result['swapped'] = 'ok'
    except Exception as error:
        result['swapped'] = in_one_line(error)
    return result


def prepare() -> None:
    """Prepares a process: one thread, no logs, and in a checkout the torchvision of ``make env``."""
    if (ROOT / 'tests' / 'torchvision_setup.py').exists():
        sys.path.append(str(ROOT / 'tests'))
        importlib.import_module('torchvision_setup')
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():  # some configs' norms ask for it when they are built
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    warnings.simplefilter('ignore')
    MMLogger.get_instance('mmengine', log_level='ERROR')


def group(paths: list[Path]) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Groups configs by model. Returns the groups, and the configs that cannot be read with the reason."""
    groups, unreadable = defaultdict(list), {}
    for path in paths:
        try:
            cfg = Config.fromfile(path)
        except Exception as error:
            unreadable[path] = in_one_line(error)
            continue
        if cfg.get('model'):
            model = without_weights(cfg.model.to_dict())
            groups[json.dumps([cfg.get('default_scope'), model], sort_keys=True, default=str)].append(path)
    return groups, unreadable


def sweep(toolbox: str, backbone: str, jobs: int, pattern: str) -> dict[str, dict]:
    """Runs every config of a toolbox and returns the result of each, by its path in the zoo."""
    root = configs_of(toolbox)
    paths = sorted(path for path in root.rglob('*.py') if '_base_' not in path.parts)
    prepare()
    groups, unreadable = group([path for path in paths if re.search(pattern, str(path.relative_to(root)))])
    results = {path: {'unswapped': reason, 'swapped': reason} for path, reason in unreadable.items()}
    members = {same[0]: same for same in groups.values()}
    start = time.monotonic()
    with multiprocessing.get_context('spawn').Pool(jobs, prepare, maxtasksperchild=50) as pool:
        tried = pool.imap_unordered(functools.partial(run_named, backbone=backbone), members)
        for done, (first, result) in enumerate(tried, 1):
            results.update(dict.fromkeys(members[first], result))
            left = (time.monotonic() - start) / done * (len(members) - done)
            print(f'\r{toolbox}: {done} of {len(members)} models, {left / 60:.1f} min left ', end='', file=sys.stderr)
    print(file=sys.stderr)
    return {str(path.relative_to(root)): results[path] for path in sorted(results)}


def run_named(path: Path, backbone: str) -> tuple[Path, dict]:
    """Runs a config and returns it with its result, since results come out of order."""
    return path, run(path, backbone)


def as_markdown(toolbox: str, results: dict[str, dict]) -> str:
    """Returns the tables of a toolbox: families with counts, and configs that fail with the reason."""
    families = defaultdict(list)
    for config, result in results.items():
        families[config.partition('/')[0]].append(result)
    rows = {family: counts(members) for family, members in families.items()}
    total = counts(results.values())
    lines = [
        f'## {toolbox} {importlib.metadata.version(DISTRIBUTIONS[toolbox])}',
        '',
        f'{total[0]} configs in {len(rows)} families; {total[1]} build unswapped, {total[2]} of these work swapped; '
        f'{total[3]} work swapped in all.',
        '',
        '| family | configs | build unswapped | of these, work swapped | work swapped | what was run |',
        '| --- | --- | --- | --- | --- | --- |',
        *(f'| {family} | {" | ".join(map(str, row))} | {ran(families[family])} |' for family, row in rows.items()),
        '',
        f'Configs of {toolbox} that do not work swapped:',
        '',
        '| configs | reason |',
        '| --- | --- |',
    ]
    reasons = defaultdict(list)
    for config, result in results.items():
        if result['swapped'] != 'ok':
            unswapped = 'builds unswapped' if result['unswapped'] == 'ok' else 'does not build unswapped either'
            reasons[f'{result["swapped"].removeprefix("swap_backbone: ")} ({unswapped})'].append(config)
    for reason, configs in sorted(reasons.items()):
        text = reason.replace('|', '\\|')
        lines.append(f'| {"<br>".join(f"`{config}`" for config in configs)} | {text} |')
    return '\n'.join(lines)


def counts(results) -> tuple[int, int, int, int]:
    """Returns how many results there are, build unswapped, of these work swapped, and work swapped."""
    results = list(results)
    builds = [result for result in results if result['unswapped'] == 'ok']
    works = [result for result in results if result['swapped'] == 'ok']
    return len(results), len(builds), sum(result in works for result in builds), len(works)


def ran(results: list[dict]) -> str:
    """Returns what was run of a family's configs."""
    return ', '.join(sorted({result['run'] for result in results if 'run' in result})) or '-'


def main() -> None:
    """Parses the command line, sweeps and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('toolboxes', nargs='+', choices=sorted(DISTRIBUTIONS), help='installed toolboxes to sweep')
    parser.add_argument('--backbone', default='SpatialMamba', choices=sorted(SMALL), help='(default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=1, help='processes, one thread each (default: 1)')
    parser.add_argument('--filter', default='', help='regular expression that a config path must contain')
    parser.add_argument('--out', type=Path, default=Path('zoo_coverage.md'), help='.md or .json to write')
    args = parser.parse_args()
    if missing := [toolbox for toolbox in args.toolboxes if importlib.util.find_spec(toolbox) is None]:
        parser.error(f'not installed: {", ".join(missing)}')

    start = time.monotonic()
    results = {toolbox: sweep(toolbox, args.backbone, args.jobs, args.filter) for toolbox in args.toolboxes}
    for toolbox, found in results.items():
        print(
            '{}: {} configs, {} build unswapped, {} of these work swapped, {} in all'.format(
                toolbox, *counts(found.values())
            )
        )
    if args.out.suffix == '.json':
        text = json.dumps(results, indent=1)
    else:
        minutes = (time.monotonic() - start) / 60
        measured = (
            f'Measured with {args.backbone} {time.strftime("%Y-%m-%d", time.gmtime())}, PyTorch {torch.__version__}, '
            f'mmengine {importlib.metadata.version("mmengine")}, processes: {args.jobs}, minutes: {minutes:.0f}.'
        )
        text = '\n'.join([INTRODUCTION, measured, '', '\n\n'.join(as_markdown(*item) for item in results.items())])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + '\n')


if __name__ == '__main__':
    main()
