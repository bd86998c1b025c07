"""`tools/plot_results.py`: what it reads, what it refuses, and the page in a real browser."""

import base64
import json
import re

import pytest
from mmengine.visualization import Visualizer
from tool_runner import browser_page, load_tool, refusal, run_tool

plot_results = load_tool('plot_results')


def train(step, **values):
    return {
        'lr': 0.1 / step,
        'base_lr': 0.1,
        'data_time': 0.0,
        'loss': 1.0 / step,
        'iter': step,
        'step': step,
        **values,
    }


def write_log(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


@pytest.fixture
def run(tmp_path):
    """The work directory of a run that was resumed after iteration 20."""
    folder = tmp_path / 'mask_rcnn'
    first = [
        train(10, epoch=1),
        train(20, epoch=1, loss=7.0),
        {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_l': -1.0, 'step': 1},
    ]
    second = [train(20, epoch=2), train(30, epoch=2, loss=float('nan')), {'coco/bbox_mAP': 0.3, 'time': 9.0, 'step': 2}]
    write_log(folder / '20260101_000000' / 'vis_data' / 'scalars.json', first)
    write_log(folder / '20260102_000000' / 'vis_data' / 'scalars.json', second)
    return folder


@pytest.fixture
def benchmark(tmp_path):
    rows = [
        {'size': size, 'row': name, 'median_ms': time, 'quartile_1_ms': 0.9 * time, 'quartile_3_ms': 1.3 * time,
         'ratio_of_first_row': 1.0, 'peak_memory_MiB': 10 * time}
        for size in ('64x64', '128x128') for name, time in (('spatial_mamba_t', 12.5), ('<b>swin_t</b>', 25.0))
    ]  # fmt: skip
    path = tmp_path / 'backbones.json'
    path.write_text(json.dumps({'header': {'device': 'x86_64', 'threads': '2'}, 'rows': rows}))
    return path


def test_a_resumed_run_is_joined_and_sorted(run):
    found = plot_results.read(run)
    assert found.label == 'mask_rcnn'
    assert found.train == {'lr': {10: 0.01, 20: 0.005, 30: 0.1 / 30}, 'loss': {10: 0.1, 20: 0.05}}
    assert found.val == {'coco/bbox_mAP': {1: 0.2, 2: 0.3}}
    assert found.val_unit == 'epoch'


def test_a_log_alone_and_a_run_without_epochs(run, tmp_path):
    assert plot_results.read(run / '20260101_000000' / 'vis_data' / 'scalars.json').train['loss'] == {10: 0.1, 20: 7.0}
    path = write_log(tmp_path / 'seg.json', [train(1000, **{'decode.loss_ce': 2.0}), {'mIoU': 40.5, 'step': 1000}])
    found = plot_results.read(path)
    assert (found.label, found.val, found.val_unit) == ('seg.json', {'mIoU': {1000: 40.5}}, 'iteration')


def test_mmengines_own_log(tmp_path):
    folder = tmp_path / 'run' / '20260101_000000'
    visualizer = Visualizer(vis_backends=[{'type': 'LocalVisBackend'}], save_dir=str(folder))
    visualizer.add_scalars({'lr': 0.1, 'loss': 2.0, 'epoch': 1}, step=5)
    visualizer.add_scalars({'lr': 0.1, 'loss': 1.0, 'epoch': 1}, step=10)
    visualizer.add_scalars({'coco/segm_mAP': 0.5}, step=1)
    found = plot_results.read(tmp_path / 'run')
    assert found.train['loss'] == {5: 2.0, 10: 1.0}
    assert found.val == {'coco/segm_mAP': {1: 0.5}}


def pictures(page):
    """The SVG of each picture of a page."""
    return [base64.b64decode(data).decode() for data in re.findall(r'base64,([A-Za-z0-9+/=]+)"', page)]


def test_page_holds_every_figure(run, benchmark):
    page = plot_results.report([plot_results.read(run), plot_results.read(benchmark)], 'A & B')
    assert '<h1>A &amp; B</h1>' in page
    assert '<b>' not in page
    training, validation, bars = pictures(page)
    for text in ('loss', 'learning rate', 'iteration', 'mask_rcnn'):
        assert f'>{text}</text>' in training
    assert '>coco/bbox_mAP</text>' in validation
    assert 'bbox_mAP_l' not in validation
    for text in ('spatial_mamba_t, 128x128', 'median time, ms', 'peak memory, MiB', '12.5', '250'):
        assert f'>{text}</text>' in bars
    cells = [[re.sub('<.*?>', '', cell) for cell in row.split('</td>')[:-1]] for row in page.split('<tr>')]
    assert ['mask_rcnn', 'loss', '0.1', '0.05', '20'] in cells
    assert ['mask_rcnn', 'coco/bbox_mAP', '0.3', '2', '0.3', '2'] in cells
    assert ['64x64', 'spatial_mamba_t', '12.5', '11.25', '16.25', '1', '125'] in cells


def test_rows_of_one_name_have_bars_of_their_own(tmp_path):
    row = {'shape': 't1', 'row': 'copy', 'quartile_1_ms': 1.0, 'quartile_3_ms': 9.0}
    rows = [{**row, 'median_ms': 2.5}, {**row, 'median_ms': 3.5}]  # tools/benchmark.py copies once for each op
    path = tmp_path / 'ops.json'
    path.write_text(json.dumps({'header': {}, 'rows': rows}))
    (bars,) = pictures(plot_results.report([plot_results.read(path)], 'Results'))
    places = re.findall(r'text-anchor: start" x="[\d.]+" y="([\d.]+)"[^>]*>[23]\.5</text>', bars)
    assert len(places) == len(set(places)) == 2
    assert bars.count('>copy, t1</text>') == 2


def test_runs_by_epoch_and_by_iteration_do_not_share_a_chart(run, tmp_path):
    other = write_log(tmp_path / 'seg.json', [train(1000), {'mIoU': 40.5, 'step': 1000}])
    page = plot_results.report([plot_results.read(run), plot_results.read(other)], 'Results')
    assert re.findall('<h2>(.*?)</h2>', page) == ['Training', 'Validation by epoch', 'Validation by iteration']
    assert [part.count('>seg.json</text>') for part in pictures(page)] == [1, 0, 1]


def test_page_in_a_browser(run, benchmark, tmp_path, monkeypatch):
    path = tmp_path / 'page with spaces.html'
    run_tool(plot_results, run, benchmark, '--out', path, monkeypatch=monkeypatch)
    with browser_page(path) as (page, complaints, asked):
        images = page.evaluate('[...document.images].map(i => [i.complete, i.naturalWidth, i.width])')
        page.set_viewport_size({'width': 500, 'height': 900})
        narrow = page.evaluate('[...document.images].map(i => i.getBoundingClientRect().right)')
        headings = page.locator('h2').all_inner_texts()
        rows = page.locator('table').last.locator('tr').count()
    assert [url for url in asked if not url.startswith('data:')] == [path.as_uri()]
    assert complaints == []
    assert headings == ['Training', 'Validation by epoch', 'Benchmark backbones.json']
    assert len(images) == 3
    assert all(complete and natural > 500 and width > 500 for complete, natural, width in images)
    assert all(right <= 500 for right in narrow)
    assert rows == 1 + 4


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    files = {
        'text.json': ('no log\n', "text.json: expected a JSON object in line 1, found 'no log'"),
        'list.json': ('{"lr": 1, "step": 1}\n[]\n', "list.json: expected a JSON object in line 2, found '[]'"),
        'metrics.json': ('{"coco/bbox_mAP": 0.4}', 'metrics.json: expected values by step, as MMEngine logs them'),
        'rows.json': ('{"header": {}, "rows": [{"row": "a"}]}', "size or shape, found ['row']"),
        'no_rows.json': ('{"header": {}, "rows": []}', 'size or shape, found []'),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_text(content)
        assert message in refusal(plot_results, tmp_path / name, monkeypatch=monkeypatch, capsys=capsys)
    message = refusal(plot_results, tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert f'{tmp_path}: expected a work directory with */vis_data/scalars.json, found none' in message
    message = refusal(plot_results, tmp_path / 'none', monkeypatch=monkeypatch, capsys=capsys)
    assert 'none: expected a file or a work directory, found neither' in message
