"""Draws training curves, validation metrics, speed and memory as one HTML page that opens from disk.

Example:
    python tools/plot_results.py work_dirs/mask_rcnn_sm_t work_dirs/benchmark/backbones_20261121_120000.json

Each argument is the work directory of a run (a resumed run's logs are joined, later values win), a log of MMEngine
(``vis_data/scalars.json``), or a JSON file of ``tools/benchmark.py``. Runs share their charts, a line each; a
benchmark has charts of its own. The page holds its pictures and needs no network.
"""

import argparse
import base64
import datetime
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure

UNITS = {
    'lr': 'learning rate',
    'time': 'time, s an iteration',
    'memory': 'GPU memory, MiB',
    'grad_norm': 'norm of the gradient',
}
"""Axis labels of what MMEngine logs; anything else, losses among it, is dimensionless and has its own name."""

NOT_DRAWN = ('epoch', 'iter', 'step', 'base_lr', 'data_time', 'eta')
BENCHMARK_UNITS = {'median_ms': 'median time, ms', 'peak_memory_MiB': 'peak memory, MiB'}
COLUMNS = 3

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Written {{ date }}.</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
{% if section.picture %}
<img src="data:image/svg+xml;base64,{{ section.picture }}" alt="{{ section.title }}">
{% endif %}
<table>
<tr>{% for name in section.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Attributes:
        label: Name of the run.
        train: For each quantity, its values by iteration.
        val: For each metric, its values by epoch, or by iteration in a run without epochs.
        val_unit: 'epoch' or 'iteration'.
    """

    label: str
    train: dict[str, dict[int, float]]
    val: dict[str, dict[int, float]]
    val_unit: str


@dataclass(frozen=True)
class Benchmark:
    """A JSON file of ``tools/benchmark.py``: its header and its rows, as they stand there."""

    label: str
    header: dict[str, str]
    rows: list[dict]


@dataclass(frozen=True)
class Section:
    """A part of the page: a picture (SVG in base64) over a table."""

    title: str
    text: str
    picture: str
    columns: list[str]
    rows: list[list[str]]


def read(path: Path) -> Run | Benchmark:
    """Reads a work directory, a log or a benchmark.

    Raises:
        ValueError: There is none of them at this path; the message says what was found.
    """
    if path.is_dir():
        logs = sorted(path.rglob('vis_data/scalars.json'))
        if not logs:
            raise ValueError(f'{path}: expected a work directory with */vis_data/scalars.json, found none')
        return read_run(path.name, [record for log in logs for record in read_log(log)], path)
    if not path.is_file():
        raise ValueError(f'{path}: expected a file or a work directory, found neither')
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None  # a log is a JSON object a line
    if isinstance(content, dict) and {'header', 'rows'} <= set(content):
        return read_benchmark(path, content)
    folder = path.parents[2] if path.parent.name == 'vis_data' and len(path.parents) > 2 else path
    return read_run(folder.name, read_log(path), path)


def read_log(path: Path) -> list[dict]:
    """Reads a log of MMEngine, a JSON object a line."""
    records = []
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f'{path}: expected a JSON object in line {number}, found {line[:40]!r}')
        records.append(record)
    return records


def read_run(label: str, records: list[dict], path: Path) -> Run:
    """Sorts the records of a run into training and validation, by quantity."""
    train, val, epochs = {}, {}, False
    for record in records:
        if 'step' not in record:
            continue
        training = 'lr' in record
        epochs |= training and 'epoch' in record
        for name, value in record.items():
            drawn = name not in NOT_DRAWN and (training or name != 'time')
            # MMEngine's COCO metric is -1 where a data set has no object of this size.
            missing = not isinstance(value, (int, float)) or not math.isfinite(value) or (not training and value == -1)
            if drawn and not missing:
                (train if training else val).setdefault(name, {})[int(record['step'])] = value
    if not train and not val:
        raise ValueError(f'{path}: expected values by step, as MMEngine logs them, found none')
    return Run(label, train, val, 'epoch' if epochs else 'iteration')


def read_benchmark(path: Path, content: dict) -> Benchmark:
    """Checks what ``tools/benchmark.py`` wrote."""
    needed = {'row', 'median_ms', 'quartile_1_ms', 'quartile_3_ms'}
    for row in content['rows'] or [{}]:
        if not needed <= set(row) or not {'size', 'shape'} & set(row):
            raise ValueError(
                f'{path}: expected rows with {", ".join(sorted(needed))}, size or shape, found {list(row)}'
            )
    return Benchmark(path.name, content['header'], content['rows'])


def encode(figure: Figure) -> str:
    """Returns a figure as an SVG in base64, its text as text."""
    buffer = io.BytesIO()
    with rc_context({'svg.fonttype': 'none'}):
        figure.savefig(buffer, format='svg', metadata={'Date': None})
    return base64.b64encode(buffer.getvalue()).decode()


def draw_curves(runs: list[Run], quantities: dict[str, list[dict[int, float]]], unit: str) -> str:
    """Draws a panel for each quantity, with a line for each run.

    Args:
        runs: The runs.
        quantities: For each quantity, the values by step of each run, in the order of ``runs``.
        unit: What a step is.
    """
    rows = -(-len(quantities) // COLUMNS)
    figure = Figure(figsize=(11.5, 2.7 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis, (name, series) in zip(axes, quantities.items(), strict=False):
        for index, values in enumerate(series):
            if values:
                steps = sorted(values)
                axis.plot(
                    steps, [values[step] for step in steps], color=f'C{index}', linewidth=1.2,
                    marker='o' if len(steps) < 15 else None, markersize=3,
                )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(unit, fontsize=8)
        axis.set_ylabel(UNITS.get(name, name.rpartition('/')[2]), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(quantities) :]:
        axis.set_axis_off()
    handles = [axes[0].plot([], [], color=f'C{index}', label=run.label)[0] for index, run in enumerate(runs)]
    figure.legend(handles=handles, loc='outside upper center', ncols=4, fontsize=8)
    return encode(figure)


def training_section(runs: list[Run]) -> Section:
    """Returns what was logged in training: losses first, then the rest."""
    names = dict.fromkeys(name for run in runs for name in run.train)
    ordered = sorted(names, key=lambda name: ('loss' not in name, list(names).index(name)))
    quantities = {name: [run.train.get(name, {}) for run in runs] for name in ordered}
    rows = [
        [run.label, name, f'{values[min(values)]:.4g}', f'{values[max(values)]:.4g}', f'{max(values)}']
        for run in runs
        for name, values in ((name, run.train.get(name)) for name in ordered)
        if values
    ]
    columns = ['run', 'quantity', 'first', 'last', 'iteration']
    text = 'By iteration, each value a mean over the last iterations as MMEngine logs it.'
    return Section('Training', text, draw_curves(runs, quantities, 'iteration'), columns, rows)


def validation_section(runs: list[Run], unit: str) -> Section:
    """Returns the metrics of runs that validate by the same unit."""
    names = dict.fromkeys(name for run in runs for name in run.val)
    quantities = {name: [run.val.get(name, {}) for run in runs] for name in names}
    rows = []
    for run in runs:
        for name, values in run.val.items():
            largest = max(values, key=values.get)
            last = f'{values[max(values)]:.4g}'
            rows.append([run.label, name, last, f'{max(values)}', f'{values[largest]:.4g}', f'{largest}'])
    columns = ['run', 'metric', 'last', f'at {unit}', 'largest', f'at {unit}']
    text = f'By {unit}. COCO metrics are fractions of 1, the others have the unit of their evaluator.'
    return Section(f'Validation by {unit}', text, draw_curves(runs, quantities, unit), columns, rows)


def benchmark_section(benchmark: Benchmark) -> Section:
    """Returns time and memory of a benchmark: bars in groups of one image size or op shape."""
    place = 'size' if 'size' in benchmark.rows[0] else 'shape'
    groups = list(dict.fromkeys(row[place] for row in benchmark.rows))
    names = list(dict.fromkeys(row['row'] for row in benchmark.rows))
    positions = [index + groups.index(row[place]) for index, row in enumerate(benchmark.rows)]  # a gap between groups
    measures = [name for name in BENCHMARK_UNITS if name in benchmark.rows[0]]
    figure = Figure(figsize=(11.5, 0.28 * len(positions) + 1.6), layout='constrained')
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for position, row in zip(positions, benchmark.rows, strict=True):
            value, end, spread = row[measure], row[measure], None
            if measure == 'median_ms':
                end = max(value, row['quartile_3_ms'])
                spread = [[max(0, value - row['quartile_1_ms'])], [end - value]]
            axis.barh(position, value, color=f'C{names.index(row["row"])}', xerr=spread, capsize=2)
            axis.annotate(f'{value:.4g}', (end, position), (6, 0), textcoords='offset points', va='center', size=7)
        axis.set_yticks(positions, [f'{row["row"]}, {row[place]}' for row in benchmark.rows], fontsize=8)
        axis.set_ylim(positions[-1] + 0.7, -0.7)
        axis.set_xlabel(BENCHMARK_UNITS[measure], fontsize=9)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
        axis.tick_params(axis='x', labelsize=8)
    columns = list(benchmark.rows[0])
    rows = [
        [f'{row[name]:.4g}' if isinstance(row[name], float) else str(row[name]) for name in columns]
        for row in benchmark.rows
    ]
    text = ', '.join(f'{name} {value}' for name, value in benchmark.header.items())
    return Section(
        f'Benchmark {benchmark.label}', f'Bars are medians, whiskers quartiles. {text}', encode(figure), columns, rows
    )


def report(results: list[Run | Benchmark], title: str) -> str:
    """Returns the page."""
    runs = [result for result in results if isinstance(result, Run)]
    sections = []
    if any(run.train for run in runs):
        sections.append(training_section(runs))
    for unit in ('epoch', 'iteration'):
        validated = [run for run in runs if run.val and run.val_unit == unit]
        if validated:
            sections.append(validation_section(validated, unit))
    sections += [benchmark_section(result) for result in results if isinstance(result, Benchmark)]
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(title=title, date=datetime.date.today().isoformat(), sections=sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, nargs='+', help='work directories, logs, or JSON files of benchmarks')
    parser.add_argument('--title', default='Results', help='title of the page')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/results.html'), help='HTML file to write')
    args = parser.parse_args()
    try:
        page = report([read(path) for path in args.results], args.title)
    except (OSError, ValueError) as error:
        sys.exit(f'plot_results: {error}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
