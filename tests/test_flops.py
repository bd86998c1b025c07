"""Parameters and multiply-adds: ops against their formulas, the published tables, the tools of the toolboxes."""

import importlib
import re
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision_setup  # noqa: F401
import yaml
from families import FAMILIES
from mmengine.analysis import FlopAnalyzer, complexity_analysis, get_model_complexity_info, parameter_count
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmspatialmamba.ops.flops import MULTIPLY_ADDS
from oracles import Call
from tool_runner import load_tool
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmspatialmamba import SpatialMamba, VMamba, flops, fuse, ops
from mmspatialmamba.models.block import Block

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
TOOL = ROOT / 'tools' / 'get_flops.py'
ARCH = {'embed_dims': 16, 'depths': (1, 1, 2, 1)}

get_flops = load_tool('get_flops')

# Of the published models: config, million parameters, billion multiply-adds, digits of the published figures.
PUBLISHED = (
    ('cls_sm_t.py', 26.75, 4.5, 2, 1),
    ('cls_sm_s.py', 43.07, 7.1, 2, 1),
    ('cls_sm_b.py', 95.75, 15.8, 2, 1),
    ('mask_rcnn_sm_t.py', 46, 261, 0, 0),
    ('mask_rcnn_sm_s.py', 63, 315, 0, 0),
    ('mask_rcnn_sm_b.py', 115, 494, 0, 0),
    ('upernet_sm_t.py', 57, 936, 0, 0),
    ('upernet_sm_s.py', 73, 992, 0, 0),
    ('upernet_sm_b.py', 127, 1176, 0, 0),
    ('cls_vmamba_t.py', 30.249064, 4.9, 6, 1),
    ('cls_vmamba_s.py', 50.147752, 8.7, 6, 1),
    ('cls_vmamba_b.py', 88.557800, 15.4, 6, 1),
    ('mask_rcnn_vmamba_t.py', 49.755, 271.16, 3, 2),
    ('mask_rcnn_vmamba_s.py', 69.654, 348.92, 3, 2),
    ('mask_rcnn_vmamba_b.py', 108, 485.5, 0, 1),  # 485.49, where 485.50 is published
    ('upernet_vmamba_t.py', 61.902572, 948.78, 6, 2),
    ('upernet_vmamba_s.py', 81.801260, 1028.40, 6, 2),
    ('upernet_vmamba_b.py', 122.069292, 1170, 6, 0),
)
FAST = ('cls_sm_t.py', 'mask_rcnn_sm_t.py', 'cls_vmamba_t.py')


def count(function, *inputs):
    """Counts by MMEngine's analyzer as it comes, with what importing the plugin has registered."""
    with torch.no_grad():
        return FlopAnalyzer(Call(function), inputs).by_operator()


def ones(*shape):
    return torch.ones(shape)


def test_each_op_is_counted_by_its_formula():
    N, H, W, E, R = 2, 3, 5, 7, 4
    tokens = N * H * W
    sequence = (ones(N, H * W, E), ones(N, H * W, E), -ones(E), ones(N, H * W, 1))
    assert count(ops.scan_states, *sequence) == {'scan_states': 4 * tokens * E}
    assert count(ops.fusion_taps, *[ones(E, 1, 3, 3)] * 3, ones(3)) == {}
    assert count(ops.state_fusion, ones(N, H, W, E), ones(25, E)) == {'state_fusion': 25 * tokens * E}
    maps = (ones(N, H, W, E), ones(N, H, W, R), ones(N, H, W, 1), ones(N, H, W, 1))
    parameters = (ones(E, R), ones(E), -ones(E), ones(E), ones(25, E))
    assert count(ops.structure_aware_ssm, *maps, *parameters) == {
        'step_size': R * tokens * E,
        'scan_states': 4 * tokens * E,
        'state_fusion': 25 * tokens * E,
        'observation': 2 * tokens * E,
    }
    K, S = 4, 3
    orders = (ones(N, H, W, E), ones(N, H, W, K, R), ones(N, H, W, K, S), ones(N, H, W, K, S))
    assert count(ops.selective_scan, *orders, ones(K, E, R), ones(K, E), -ones(K, E, S), ones(K, E)) == {
        'step_size': K * R * tokens * E,
        'scan_states': K * (1 + 3 * S) * tokens * E,
        'observation': K * (1 + S) * tokens * E,
    }
    conv = partial(ops.depthwise_conv, stride=2)
    assert count(conv, maps[0], ones(E, 1, 3, 3), ones(E)) == {'conv': 9 * N * 2 * 3 * E}
    assert count(ops.gated_norm, maps[0], maps[0], ones(E), ones(E)) == {'layer_norm': 5 * tokens * E}
    assert count(ops.layer_norm, maps[0], ones(E), ones(E)) == {'layer_norm': 5 * tokens * E}
    assert count(ops.layer_norm, maps[0]) == {'layer_norm': 4 * tokens * E}


def test_a_fused_block_counts_what_its_layers_count():
    x = torch.rand(2, 6, 7, 16)
    layered, fused = (block.requires_grad_(False) for block in (Block(16, 0.0), fuse(Block(16, 0.0))))
    parts = count(layered, x)
    assert count(lambda x: fused(x), x) == parts  # as a function: MMEngine hooks every module that it is given
    assert set(parts) >= {'linear', 'conv', 'layer_norm', 'scan_states'}


def by_pytorch(block, x):
    """Operations that PyTorch's own counter finds, forward and with backward."""
    with FlopCounterMode(display=False) as forward:
        out = block(x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_pytorchs_own_counter_knows_the_ops():
    """Two operations for each multiply-add of MMEngine's count but those of norms, and twice as many in backward."""
    x = torch.rand(2, 6, 7, 16, requires_grad=True)
    parts = count(Block(16, 0.0), x)
    expected = 2 * (sum(parts.values()) - parts['layer_norm'])
    assert by_pytorch(Block(16, 0.0), x) == (expected, 2 * expected)
    assert by_pytorch(fuse(Block(16, 0.0)), x) == (expected, 2 * expected)


@pytest.mark.parametrize('name', MULTIPLY_ADDS)
def test_every_op_is_known_to_both_counters(name):
    op = getattr(torch.ops.mmspatialmamba, name)
    backward = getattr(torch.ops.mmspatialmamba, f'{name}_backward')
    assert {op, backward} <= set(flop_registry)
    assert f'mmspatialmamba::{name}' in flops.HANDLES


def count_backbone(model, height, width):
    """Counts a backbone layer by layer, from the shapes of its weights; height and width are multiples of 32."""
    total = 0

    def add(layer, area):
        nonlocal total
        for module in layer.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                total += module.weight.numel() * area
            elif isinstance(module, nn.BatchNorm2d):
                total += 2 * module.num_features * area
            elif isinstance(module, nn.LayerNorm):
                total += 5 * module.normalized_shape[0] * area

    is_vmamba = isinstance(model, VMamba)
    before, after = (('conv1', 'norm1'), ('conv2', 'norm2')) if is_vmamba else STEM
    area = height * width // 4
    for name in before:
        add(getattr(model.stem, name), area)
    area //= 4
    for name in after:
        add(getattr(model.stem, name), area)
    for index, stage in enumerate(model.stages):
        for block in stage.blocks:
            add(block, area)
            if is_vmamba:
                orders, inner, rank = block.ss2d.dt_weight.shape
                total += orders * inner * area * (rank + 4 + 2)
            else:
                inner, rank = block.ssm.dt_weight.shape
                total += inner * area * (rank + 4 + 25 + 2)
        if str(index) in model.out_norms:
            add(model.out_norms[str(index)], area)
        if stage.downsample is not None:
            if not is_vmamba:
                add(stage.downsample.expand, area)
            area //= 4
            for name in ('conv', 'norm') if is_vmamba else ('dwconv', 'project'):
                add(getattr(stage.downsample, name), area)
    return total


STEM = ('reduce', 'residual'), ('expand', 'project')
"""Layers of Spatial-Mamba's stem at stride 2 and at stride 4."""


@pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.files)
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3,)])
def test_mmengines_own_function_counts_the_backbone(family, out_indices):
    model = family.build(out_indices=out_indices).eval()
    found = get_model_complexity_info(model, (3, 32, 64), show_table=False, show_arch=False)
    assert found['flops'] == count_backbone(model, 32, 64)


def test_importing_the_plugin_warns_where_mmengine_has_no_table(monkeypatch):
    monkeypatch.delattr(complexity_analysis, '_DEFAULT_SUPPORTED_FLOP_OPS')
    with pytest.warns(UserWarning, match='this MMEngine has no mmengine.analysis'):
        flops.register()


@pytest.mark.parametrize(
    ('name', 'parameters', 'operations', 'parameter_digits', 'operation_digits'),
    [pytest.param(*row, id=row[0], marks=() if row[0] in FAST else pytest.mark.end_to_end) for row in PUBLISHED],
)
def test_published_models(name, parameters, operations, parameter_digits, operation_digits):
    config = Config.fromfile(CONFIGS / name)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = get_flops.build_model(config)
        analyzer = get_flops.analyze(model, 3, *get_flops.PUBLISHED_SHAPES[config.default_scope])
    assert round(parameter_count(model)[''] / 1e6, parameter_digits) == parameters
    found, parts = analyzer.total(), analyzer.by_operator()
    assert abs(found / 1e9 / operations - 1) < 0.01 or round(found / 1e9, operation_digits) == operations
    elements = parts['observation'] // 2
    assert parts['scan_states'] == 4 * elements
    if 'vmamba' in name:  # the published convention: 10 for scan and observation
        published = found + (10 - 6) * elements
    else:  # 9 for the scan, 27 for the three dilated kernels, nothing for the observation
        assert parts['state_fusion'] == 25 * elements
        published = found + (9 + 27 - 31) * elements
    assert round(published / 1e9, operation_digits) == operations


def test_every_published_model_is_counted():
    entries = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())['Models']
    published = {Path(entry['Config']).name for entry in entries}
    counted = {row[0] for row in PUBLISHED}
    assert counted <= published
    for name in published - counted:  # the 3x models are those of the 1x configs
        models = [Config.fromfile(CONFIGS / same).model for same in (name, name.replace('_3x', ''))]
        assert name != name.replace('_3x', '')
        assert models[0] == models[1]


def run_main(path, args, monkeypatch, capsys):
    """Runs a tool of this project or of a toolbox and returns what it printed."""
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)])
    with DefaultScope.overwrite_default_scope('mmengine'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        runpy.run_path(str(path), run_name='__main__')
    return capsys.readouterr().out


def write_config(path, base, **changes):
    """Writes a config that changes another's model."""
    path.write_text(f'_base_ = {str(CONFIGS / base)!r}\nmodel = {changes!r}\n')
    return path


SMALL = {'arch': {'_delete_': True, **ARCH}}


def total(printed):
    return float(re.search(r'multiply-adds: ([\d.]+) G', printed).group(1))


def toolbox_tool(toolbox):
    """The FLOP counter that a toolbox installs."""
    return Path(importlib.import_module(toolbox).__file__).parent / '.mim' / 'tools' / 'analysis_tools' / 'get_flops.py'


def test_mmpretrains_own_tool_counts_the_ops(monkeypatch, capsys, tmp_path):
    config = write_config(tmp_path / 'config.py', 'cls_sm_t.py', backbone=SMALL, head={'in_channels': 128})
    printed = run_main(toolbox_tool('mmpretrain'), (config, '--shape', 64, 96), monkeypatch, capsys)
    pooling = 128 * 2 * 3
    expected = count_backbone(SpatialMamba(ARCH, out_indices=(3,)), 64, 96) + pooling
    assert f'Flops: {_format_size(expected)}\n' in printed


def test_mmdets_own_tool_counts_the_ops(monkeypatch, capsys, tmp_path):
    shapes = ROOT / 'tools' / 'make_shapes_dataset.py'
    run_main(shapes, (tmp_path / 'shapes', '--train', 1, '--val', 1), monkeypatch, capsys)
    root = f'{tmp_path}/shapes/coco/'
    config = CONFIGS / 'quickstart_mask_rcnn.py'
    options = ('--cfg-options', f'val_dataloader.dataset.data_root={root}')
    theirs = run_main(toolbox_tool('mmdet'), (config, *options), monkeypatch, capsys)
    ours = run_main(TOOL, (config, '--shape', 128, 160), monkeypatch, capsys)
    # Their number of proposals depends on the random weights: 100 here as in ours, as a rule.
    assert abs(total_of(theirs, r'Flops: ([\d.]+)G') / total_of(ours) - 1) < 1e-3


def total_of(printed, pattern=r'multiply-adds: ([\d.]+) G'):
    return float(re.search(pattern, printed).group(1))


@pytest.mark.end_to_end
@pytest.mark.parametrize(('name', 'side'), [('mask2former_semantic_sm_t.py', 64), ('dino_sm_t.py', 320)])
def test_models_whose_heads_need_samples(name, side, monkeypatch, capsys):
    printed = run_main(TOOL, (CONFIGS / name, '--shape', side, side), monkeypatch, capsys)
    value, unit = re.search(r'\|  backbone +\| +[\d.]+M +\| +([\d.]+)([MG])', printed).groups()
    backbone = float(value) * {'M': 1e6, 'G': 1e9}[unit]
    outputs = Config.fromfile(CONFIGS / name).model.backbone.get('out_indices', (0, 1, 2, 3))
    expected = count_backbone(SpatialMamba('tiny', out_indices=outputs), side, side)
    assert backbone == pytest.approx(expected, rel=2e-3)
    assert total_of(printed) * 1e9 > 1.5 * backbone


def test_proposals_are_as_many_as_the_config_keeps(monkeypatch, capsys):
    option = 'model.test_cfg.rpn.max_per_img='
    args = (CONFIGS / 'quickstart_mask_rcnn.py', '--shape', 64, 64, '--cfg-options')
    fewer, more = (total_of(run_main(TOOL, (*args, f'{option}{count}'), monkeypatch, capsys)) for count in (1000, 2000))
    box_head = 64 * 49 * 256 + 256 * 256 + 256 * 4 + 256 * 12  # two shared layers, classes and boxes of a proposal
    assert more - fewer == pytest.approx(1000 * box_head / 1e9, abs=0.02)


def test_more_channels(monkeypatch, capsys):
    args = (CONFIGS / 'atss_sm_t.py', '--shape', 32, 32, '--by-module', 0)
    options = ('--cfg-options', 'model.backbone.in_channels=5')
    three, five = (run_main(TOOL, (*args, *more), monkeypatch, capsys) for more in ((), options))
    assert 'module' not in three
    assert total_of(five) >= total_of(three)
    assert 'parameters: 34.34 M' in three


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((CONFIGS / 'dino_sm_t.py', '--shape', 64, 64), 'dino_sm_t.py: expected a model that runs at 64x64, found'),
        (('none.py',), 'none.py: expected a config file, found no such file'),
        (('empty.py',), 'empty.py: expected a config with the key model, found lr'),
        (('scopeless.py',), 'argument --shape is needed: default_scope is None'),
        (('scopeless.py', '--shape', 0, 5), 'argument --shape: expected a height and a width of at least 1 pixel'),
        (('scopeless.py', '--by-module', -1), 'argument --by-module: expected a depth of at least 0, got -1'),
    ],
)
def test_bad_input_is_one_line(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path('empty.py').write_text('lr = 1')
    Path('scopeless.py').write_text('model = dict(type="SpatialMamba")')
    with pytest.raises(SystemExit) as stop:
        run_main(TOOL, args, monkeypatch, capsys)
    # argparse prints its line itself; what main gives to sys.exit is printed by Python.
    (line,) = (capsys.readouterr().err if stop.value.code == 2 else stop.value.code).splitlines()[-1:]
    assert message in line
