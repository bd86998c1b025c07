"""Times the ops and whole backbones beside their peers, in one run, alternating; parity first.

Examples:
    python tools/benchmark.py ops --shapes t1_800x1280 t3_512x512
    python tools/benchmark.py backbones --sizes 800x1280 --mode inference
    python tools/benchmark.py backbones --sizes 512x512 --mode training --baseline original.models:build_tiny
    python tools/benchmark.py backbones --sizes 512x512 1024x1024 2048x2048 4096x4096 --models spatial_mamba_t --plot

``ops`` needs PyTorch alone (and Triton on a GPU). Its rows are the compiled op, the plain PyTorch reference, and a copy
of the input, which is what the memory allows. ``backbones`` compares with mmdet's Swin-T and ResNet-50 and mmpretrain's
ConvNeXt-T where they can be imported, and with whatever ``--baseline`` builds. Times are medians with the quartiles;
on a machine that others use, trust the ratios of one run and no single time. Every run writes a JSON file.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {'t': 64, 's': 64, 'b': 96}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error against the reference above which nothing is timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    ops_parser = commands.add_parser('ops', help='the fused op and its halves')
    ops_parser.add_argument(
        '--shapes', nargs='+', default=['t1_800x1280', 't2_800x1280', 't3_800x1280', 't4_800x1280'],
        help='arch and stage _ image height x width, such as t1_800x1280',
    )  # fmt: skip
    model_parser = commands.add_parser('backbones', help='whole backbones')
    model_parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    model_parser.add_argument('--sizes', nargs='+', default=['800x1280'], help='image sizes, height x width')
    model_parser.add_argument('--mode', choices=('inference', 'training'), default='inference')
    model_parser.add_argument(
        '--baseline', help='MODULE:CALLABLE that builds another backbone, called without arguments'
    )
    model_parser.add_argument('--plot', action='store_true', help='draw time and memory against the image size')
    for sub in (ops_parser, model_parser):
        sub.add_argument('--batch', type=int, default=1)
        sub.add_argument('--dtype', choices=DTYPES, default='float32', help='of maps; models run under autocast')
        sub.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        sub.add_argument('--threads', type=int, default=2, help='CPU threads')
        sub.add_argument('--rounds', type=int, default=7, help='counted runs of each row')
        sub.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the JSON files')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        rows = benchmark_ops(args) if args.command == 'ops' else benchmark_backbones(args)
    except ValueError as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 2
    report(args, rows)
    return 0


def import_ops() -> types.ModuleType:
    """Imports ``mmspatialmamba.ops``, from its folder if MMEngine, which the package needs, is not installed."""
    if importlib.util.find_spec('mmengine') is not None:
        return importlib.import_module('mmspatialmamba.ops')
    name = 'mmspatialmamba.ops'
    sys.modules['mmspatialmamba'] = types.ModuleType('mmspatialmamba')
    folder = ROOT / 'ops'
    spec = importlib.util.spec_from_file_location(
        name, folder / '__init__.py', submodule_search_locations=[str(folder)]
    )
    ops = importlib.util.module_from_spec(spec)
    sys.modules[name] = ops
    spec.loader.exec_module(ops)
    return ops


def benchmark_ops(args: argparse.Namespace) -> list[dict]:
    """Returns a row for each shape, op, direction and implementation."""
    ops = import_ops()
    backend = ops.backends().get(args.device.partition(':')[0])
    print(f'ops on {args.device}: {backend}')
    rows = []
    for shape in args.shapes:
        channels, rank, height, width = parse_stage(shape)
        inputs = op_inputs(args, channels, rank, height, width)
        for op, (compiled, reference, backward) in op_callables(ops, inputs).items():
            check_parity(f'{op} {shape}', compiled, reference, inputs['u'].dtype)
            u, out = inputs['u'], torch.empty_like(inputs['u'])
            candidates = {
                'copy': lambda out=out, u=u: out.copy_(u),
                f'{op} forward': compiled,
                f'{op} backward': backward,
                f'{op} forward, reference': reference,
            }
            times = measure(candidates, args.device, args.rounds)
            for name, seconds in times.items():
                rows.append(
                    {
                        'shape': shape,
                        'row': name,
                        **summarise(seconds),
                        'times_copy': median_ratio(seconds, times['copy']),
                    }
                )
    return rows


def parse_stage(shape: str) -> tuple[int, int, int, int]:
    """Returns inner channels, rank, height and width of a stage's map from a name such as 't1_800x1280'."""
    try:
        stage, size = shape.split('_')
        index, channels = int(stage[1]) - 1, WIDTHS[stage[0]]
        height, width = parse_size(size)
        if len(stage) != 2 or not 0 <= index <= 3:
            raise ValueError(stage)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f'shape must be like t1_800x1280 (arch t, s or b, stage 1 to 4), got {shape!r}') from error
    channels *= 2**index
    stride = 4 * 2**index
    return 2 * channels, -(-channels // 16), -(-height // stride), -(-width // stride)


def parse_size(size: str) -> tuple[int, int]:
    """Returns height and width from a name such as '800x1280'."""
    parts = size.split('x')
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'size must be like 800x1280 (height x width), got {size!r}')
    return int(parts[0]), int(parts[1])


def op_inputs(args: argparse.Namespace, E: int, R: int, H: int, W: int) -> dict[str, torch.Tensor]:
    """Returns random arguments of the fused op with the values that a model has at the start of training."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[args.dtype]

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(args.device, dtype)

    packed = normal(args.batch, H, W, R + 2, dtype=dtype)
    dt, B, C = packed.split((R, 1, 1), -1)
    inputs = {
        'u': normal(args.batch, H, W, E, dtype=dtype), 'dt': dt, 'B': B, 'C': C,
        'dt_weight': normal(E, R) * R**-0.5, 'dt_bias': normal(E) - 4, 'A': -torch.ones(E, device=args.device),
        'D': torch.ones(E, device=args.device), 'taps': normal(25, E) / 5,
    }  # fmt: skip
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def op_callables(ops: types.ModuleType, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[Callable, ...]]:
    """Returns for each op its compiled forward, its reference forward and its compiled backward, without arguments."""
    fused = importlib.import_module(f'{ops.__name__}.structure_aware_ssm.reference')
    scan = importlib.import_module(f'{ops.__name__}.scan_states.reference')
    fusion = importlib.import_module(f'{ops.__name__}.state_fusion.reference')
    u, A, B, taps = (inputs[name] for name in ('u', 'A', 'B', 'taps'))
    sequence = [u.detach().flatten(1, 2), torch.rand_like(u.flatten(1, 2)), A.detach(), B.detach().flatten(1, 2)]
    cases = {
        'structure_aware_ssm': (ops.structure_aware_ssm, fused.structure_aware_ssm_reference, list(inputs.values())),
        'scan_states': (ops.scan_states, scan.scan_states_reference, sequence),
        'state_fusion': (ops.state_fusion, fusion.state_fusion_reference, [u, taps]),
    }
    callables = {}
    for name, (op, reference, arguments) in cases.items():
        arguments = [tensor.detach().requires_grad_() for tensor in arguments]
        output = op(*arguments)
        gradient = torch.ones_like(output)

        def backward(output=output, arguments=arguments, gradient=gradient):
            return torch.autograd.grad(output, arguments, gradient, retain_graph=True)

        detached = [tensor.detach() for tensor in arguments]
        callables[name] = (
            lambda op=op, detached=detached: op(*detached),
            lambda reference=reference, detached=detached: reference(*detached),
            backward,
        )
    return callables


def check_parity(name: str, compiled: Callable, reference: Callable, dtype: torch.dtype) -> None:
    """Raises if the compiled op differs from the reference: nothing is timed then."""
    actual, expected = compiled().float(), reference().float()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCES[dtype]:
        raise ValueError(f'{name} differs from the reference by {error:.1e}, more than {TOLERANCES[dtype]:.0e}')


def build_spatial_mamba(arch: str, fused: bool = False) -> torch.nn.Module:
    from mmspatialmamba import SpatialMamba

    return SpatialMamba(arch, fused=fused)


def build_swin() -> torch.nn.Module:
    from mmdet.models.backbones import SwinTransformer

    return SwinTransformer(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)


def build_resnet() -> torch.nn.Module:
    from mmdet.models.backbones import ResNet

    return ResNet(depth=50)


def build_convnext() -> torch.nn.Module:
    from mmpretrain.models.backbones import ConvNeXt

    return ConvNeXt(arch='tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    'spatial_mamba_t': lambda: build_spatial_mamba('tiny'),
    'spatial_mamba_t_fused': lambda: build_spatial_mamba('tiny', fused=True),
    'spatial_mamba_s': lambda: build_spatial_mamba('small'),
    'spatial_mamba_b': lambda: build_spatial_mamba('base'),
    'swin_t': build_swin,
    'resnet_50': build_resnet,
    'convnext_t': build_convnext,
}


def build(name: str, baseline: str | None) -> torch.nn.Module:
    """Builds a model by its name in ``MODELS``, or the one that ``--baseline`` names."""
    if name != 'baseline':
        return MODELS[name]()
    module, _, attribute = baseline.partition(':')
    if not attribute:
        raise ValueError(f'--baseline must be MODULE:CALLABLE, got {baseline!r}')
    return getattr(importlib.import_module(module), attribute)()


def step(model: torch.nn.Module, x: torch.Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs the model once: forward, or forward, backward and an update."""
    dtype = DTYPES[args.dtype]
    enabled = dtype != torch.float32
    device = x.device.type
    if args.mode == 'inference':
        model.eval()

        def run():
            with torch.inference_mode(), torch.autocast(device, dtype, enabled=enabled):
                model(x)
    else:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        # Random ones: a loss such as the mean square, which norms keep constant, leaves gradients that are denormal
        # numbers, on which a CPU takes many times as long.
        gradients = []

        def run():
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=enabled):
                outputs = model(x)
            if not gradients:
                gradients.extend(1e-3 * torch.randn_like(out) for out in outputs)
            torch.autograd.backward(outputs, gradients)
            optimizer.step()

    return run


def benchmark_backbones(args: argparse.Namespace) -> list[dict]:
    """Returns a row for each size and model, with time, peak memory and ratios to the first model."""
    names = [*args.models, *(['baseline'] if args.baseline else [])]
    models = {}
    for name in names:
        try:
            models[name] = build(name, args.baseline).to(args.device)
        except (ImportError, RuntimeError) as error:
            print(f'{name}: left out, it cannot be imported ({error})')
    rows = []
    for size in args.sizes:
        shape = (args.batch, 3, *parse_size(size))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        times = measure({name: step(model, x, args) for name, model in models.items()}, args.device, args.rounds)
        first = times[next(iter(times))]
        for name, seconds in times.items():
            rows.append(
                {
                    'size': size,
                    'row': name,
                    **summarise(seconds),
                    'first_row_in_it': median_ratio(first, seconds),
                    'peak_memory_MiB': peak_memory(name, shape, args),
                }
            )
    return rows


def measure(candidates: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    """Times the candidates in turn, ``rounds`` times each after one warm-up, in seconds."""
    times = {name: [] for name in candidates}
    for count in range(rounds + 1):
        for name, run in candidates.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if count:
                times[name].append(time.perf_counter() - start)
        print(f'\rround {count} of {rounds}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def synchronise(device: str) -> None:
    """Waits for the GPU, if the device is one."""
    if device != 'cpu':
        torch.cuda.synchronize(device)


def summarise(seconds: list[float]) -> dict[str, float]:
    """Returns median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {'median_ms': 1e3 * median, 'quartile_1_ms': 1e3 * low, 'quartile_3_ms': 1e3 * high}


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Returns the median over the rounds of the ratio of two candidates, which drifts of the machine leave alone."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def peak_memory(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    """Returns the peak memory that one run adds to the model's own, in MiB, from a process of its own."""
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (name, shape, args))


def _peak_memory(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    run = step(build(name, args.baseline).to(args.device), torch.randn(shape, device=args.device), args)
    if args.device == 'cpu':
        before = _memory_KiB('VmRSS')
        run()
        return (_memory_KiB('VmHWM') - before) / 1024
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _memory_KiB(field: str) -> int:
    """Returns the resident memory of this process, now (VmRSS) or at most (VmHWM); Linux only.

    `resource.getrusage` would return the peak of the process that started this one, where that is higher.
    """
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{field}:'))


def header(args: argparse.Namespace) -> dict[str, str]:
    """Returns what a figure needs beside it: device, threads, versions, commit and date."""
    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if args.device != 'cpu' else platform.processor() or platform.machine()
    return {
        'command': ' '.join(sys.argv),
        'device': device,
        'vectors': torch.backends.cpu.get_cpu_capability(),
        'threads': str(args.threads),
        'torch': torch.__version__,
        'python': platform.python_version(),
        'commit': commit or 'unknown',
        'date': datetime.date.today().isoformat(),
    }


def report(args: argparse.Namespace, rows: list[dict]) -> None:
    """Prints a Markdown table and writes the JSON file and, if asked for, the picture."""
    facts = header(args)
    print('\n' + ', '.join(f'{name} {value}' for name, value in facts.items()) + '\n')
    columns = list(rows[0])
    print('| ' + ' | '.join(columns) + ' |')
    print('| ' + ' | '.join('---' for _ in columns) + ' |')
    for row in rows:
        print(
            '| '
            + ' | '.join(f'{value:.2f}' if isinstance(value, float) else str(value) for value in row.values())
            + ' |'
        )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f'{args.command}_{datetime.datetime.now():%Y%m%d_%H%M%S}.json'
    path.write_text(json.dumps({'header': facts, 'rows': rows}, indent=1))
    print(f'\nwrote {path}')
    if getattr(args, 'plot', False):
        print(f'wrote {plot(rows, path.with_suffix(".png"))}')


def plot(rows: list[dict], path: Path) -> Path:
    """Draws time and peak memory against the number of pixels, a line for each model."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for axis, key, label in zip(axes, ('median_ms', 'peak_memory_MiB'), ('time, ms', 'peak memory, MiB'), strict=True):
        for name in dict.fromkeys(row['row'] for row in rows):
            points = [(parse_size(row['size']), row[key]) for row in rows if row['row'] == name]
            axis.loglog([h * w / 1e6 for (h, w), _ in points], [value for _, value in points], marker='o', label=name)
        axis.set(xlabel='image size, megapixels', ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    return path


if __name__ == '__main__':
    sys.exit(main())
