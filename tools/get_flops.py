"""Counts the parameters and multiply-adds of any config at any image size, without a data set.

Example:
    python tools/get_flops.py configs/mask_rcnn_sm_t.py --shape 800 1280 --by-module 2

The convention is MMEngine's: one operation per multiply-add, scan and state fusion counted (mmspatialmamba/ops/flops.py
says how), activations not. As in the toolboxes, a model is counted up to the outputs of its heads, without loss,
post-processing or auxiliary head. A two-stage detector gets as many proposals as its test_cfg keeps at most, 1000 in
the published configs. Nothing is loaded: the weights do not matter.
"""

import argparse
import inspect
import sys
from functools import partial
from pathlib import Path

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.print_helper import complexity_stats_table
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement, InstanceData
from mmspatialmamba.ops.flops import PARTS

from mmspatialmamba import unfuse
from mmspatialmamba.flops import HANDLES

PUBLISHED_SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048), 'mmpretrain': (224, 224)}
"""Height and width at which the published tables count, by the toolbox of the config."""


def build_model(config: Config) -> torch.nn.Module:
    """Builds the model of a config on the CPU, in evaluation mode."""
    init_default_scope(config.get('default_scope') or 'mmengine')
    return revert_sync_batchnorm(MODELS.build(config.model)).eval()


def make_sample(height: int, width: int) -> BaseDataElement:
    """Returns what a model reads of an image's annotations to compute its outputs: sizes, and no object."""
    size = (height, width)
    return BaseDataElement(
        metainfo={
            'ori_shape': size,
            'img_shape': size,
            'pad_shape': size,
            'batch_input_shape': size,
            'scale_factor': (1.0, 1.0),
        }
    )


def fix_proposals(rpn_head: torch.nn.Module, count: int) -> None:
    """Makes an RPN return ``count`` proposals an image: its own, repeated or cut.

    How many survive its suppression depends on the weights, which are random here.
    """
    predict = rpn_head.predict

    def predict_fixed(*args, **kwargs) -> list[InstanceData]:
        results = predict(*args, **kwargs)
        return [proposals[torch.arange(count) % len(proposals)] for proposals in results]

    rpn_head.predict = predict_fixed


def analyze(model: torch.nn.Module, in_channels: int, height: int, width: int) -> FlopAnalyzer:
    """Traces a model of a toolbox on one image of random pixels.

    Args:
        model: Model that takes ``mode='tensor'``, as those of mmdet, mmseg and mmpretrain do. It is changed: use it
            for nothing else.
        in_channels: Number of image channels.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        MMEngine's analyzer, its analysis done.
    """
    samples = [make_sample(height, width)]
    rpn_test = model.test_cfg.get('rpn') if getattr(model, 'rpn_head', None) and model.test_cfg else None
    if rpn_test:
        fix_proposals(model.rpn_head, rpn_test.max_per_img)
    # mmseg calls its decode heads without samples, which those that it takes from mmdet want.
    decode_head = getattr(model, 'decode_head', None)
    if decode_head and 'batch_data_samples' in inspect.signature(decode_head.forward).parameters:
        decode_head.forward = partial(decode_head.forward, batch_data_samples=samples)
    model.forward = partial(model.forward, data_samples=samples, mode='tensor')

    unfuse(model)  # MMEngine hooks every layer
    analyzer = FlopAnalyzer(model, (torch.rand(1, in_channels, height, width),)).set_op_handle(**HANDLES)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    with torch.no_grad():
        analyzer.total()
    return analyzer


def describe(model: torch.nn.Module, analyzer: FlopAnalyzer) -> str:
    """Returns the totals as text."""
    parameters = parameter_count(model)
    operations, parts = analyzer.total(), analyzer.by_operator()
    ours = sum(parts[part] for part in PARTS)
    lines = [
        f'parameters: {parameters[""] / 1e6:.2f} M',
        f'multiply-adds: {operations / 1e9:.2f} G',
        f'  of which scan and fusion: {ours / 1e9:.3f} G ('
        + ', '.join(f'{part.replace("_", " ")} {parts[part] / 1e9:.3f}' for part in PARTS)
        + ')',
    ]
    for name in sorted(name for name in analyzer.uncalled_modules() if '.' not in name and parameters.get(name)):
        lines.append(f'  not called, its parameters are counted: {name}, {parameters[name] / 1e6:.2f} M')
    unknown = sorted(kind.removeprefix('aten::').removeprefix('prim::PythonOp.') for kind in analyzer.unsupported_ops())
    lines.append(f'  counted as nothing: {", ".join(unknown)}')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='config file of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels; by default that of the published tables: '
        + ', '.join(f'{height} {width} for {scope}' for scope, (height, width) in PUBLISHED_SHAPES.items()),
    )
    parser.add_argument('--by-module', type=int, default=1, metavar='DEPTH', help='depth of the table (default 1)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='changes of the config'
    )
    args = parser.parse_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f'argument --shape: expected a height and a width of at least 1 pixel, got {args.shape}')
    if args.by_module < 0:
        parser.error(f'argument --by-module: expected a depth of at least 0, got {args.by_module}')
    if not args.config.is_file():
        parser.error(f'{args.config}: expected a config file, found no such file')

    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    if not isinstance(config.get('model'), ConfigDict):
        sys.exit(f'{args.config}: expected a config with the key model, found {", ".join(config) or "no key"}')
    shape = args.shape or PUBLISHED_SHAPES.get(config.get('default_scope'))
    if shape is None:
        parser.error(f'argument --shape is needed: default_scope is {config.get("default_scope")!r}')
    model = build_model(config)
    in_channels = config.model.get('backbone', {}).get('in_channels', 3)
    try:
        analyzer = analyze(model, in_channels, *shape)
    except RuntimeError as error:
        size = f'{shape[0]}x{shape[1]}'
        sys.exit(f'{args.config}: expected a model that runs at {size}, found {error} (some need larger images)')
    if args.by_module:
        print(complexity_stats_table(analyzer, max_depth=args.by_module, show_param_shapes=False))
    print(f'{args.config} at {shape[0]}x{shape[1]}')
    print(describe(model, analyzer))


if __name__ == '__main__':
    main()
