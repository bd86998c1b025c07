"""Times the ops and whole backbones beside their peers, in one run, alternating; parity first.

Examples:
    python tools/benchmark.py ops --shapes t1_800x1280 t3_512x512
    python tools/benchmark.py ops --batch 2 --dtype bfloat16 --device cuda
    python tools/benchmark.py backbones --sizes 800x1280 --mode inference
    python tools/benchmark.py backbones --sizes 512x512 --mode training --baseline original.models:build_tiny
    python tools/benchmark.py backbones --sizes 512x512 1024x1024 2048x2048 4096x4096 --models spatial_mamba_t --plot
    python tools/benchmark.py backbones --models spatial_mamba_t --device cuda --profile

``ops`` needs PyTorch alone (and Triton on a GPU). Its rows are each op forward and backward, its plain PyTorch
reference, and a copy of the input, which is what the memory allows. ``backbones`` compares with Swin-T, ResNet-50 and
ConvNeXt-T of mmdet and mmpretrain, where those are missing of timm or torchvision, and with whatever ``--baseline``
builds. Times are medians with the quartiles; on a machine that others use, trust the ratios of one run and no single
time. Every run writes a JSON file.

On a GPU, times are those of device events, of ops with a second-level cache that was written over. ``enqueue_ms`` is
what the processor needed to enqueue the work, ``graph_ms`` the replay of a CUDA graph, ``kernels`` what Triton compiled
or loaded for a row.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {'t': 64, 's': 64, 'b': 96}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error against the reference in float64, forward and backward, above which nothing is timed."""
WARM_UPS = {'cpu': 1, 'cuda': 3}
"""Runs of each row that are not counted, by the type of the device: the first ones on a GPU compile, plan and grow."""
CACHE_BYTES = 256 * 2**20
"""What is written before each timed run of an op on a GPU, several times the second-level cache of any."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    ops_parser = commands.add_parser('ops', help='each op')
    ops_parser.add_argument(
        '--shapes', nargs='+', default=['t1_800x1280', 't2_800x1280', 't3_800x1280', 't4_800x1280'],
        help='arch and stage _ image height x width, such as t1_800x1280',
    )  # fmt: skip
    model_parser = commands.add_parser('backbones', help='whole backbones')
    model_parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    model_parser.add_argument('--sizes', nargs='+', default=['800x1280'], help='image sizes, height x width')
    model_parser.add_argument('--mode', choices=('inference', 'training'), default='inference')
    model_parser.add_argument(
        '--baseline', nargs='+', default=[], metavar='MODULE:CALLABLE', dest='baselines',
        help='builds another backbone, called without arguments',
    )  # fmt: skip
    model_parser.add_argument(
        '--profile', action='store_true', help="print the device's kernels of one run of each row"
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


def benchmark_ops(args: argparse.Namespace) -> list[dict]:
    """Returns a row for each shape, op, direction and implementation."""
    from mmspatialmamba import ops

    print(f'ops on {args.device}: {ops.backends().get(torch.device(args.device).type)}')
    rows = []
    for shape in args.shapes:
        for name, (op, arguments) in op_cases(args, *parse_stage(shape)).items():
            check_parity(f'{name} {shape}', op, arguments)
            rows += [{'shape': shape, **row} for row in time_op(args, name, op, arguments)]
    return rows


def time_op(args: argparse.Namespace, name: str, op: Callable, arguments: tuple) -> list[dict]:
    """Returns the rows of one op: a copy of its first argument, forward, backward, and forward of the reference."""
    op_name = op.__name__.partition('.')[0]  # without the name of an overload
    reference = getattr(importlib.import_module(f'mmspatialmamba.ops.{op_name}.reference'), f'{op_name}_reference')
    x = arguments[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    candidates = {
        'copy': lambda: out.copy_(x),
        f'{name} forward': lambda: op(*arguments),
        f'{name} backward': backward_of(op, arguments),
        f'{name} forward, reference': lambda: reference(*arguments),
    }
    samples = measure(candidates, args.device, args.rounds, cold=True)
    rows = [{'row': row, **summarise(found)} for row, found in samples.items()]
    if args.device != 'cpu':  # whose processor often enqueues an op for longer than the device runs it
        stream = torch.cuda.Stream(args.device)
        with torch.cuda.stream(stream):  # on which a gradient is computed is decided by the forward pass
            candidates[f'{name} backward'] = backward_of(op, arguments)
        replays = {row: captured(run, stream) for row, run in candidates.items()}
        samples = measure(replays, args.device, args.rounds, cold=True)
        rows = [{**row, 'graph_ms': summarise(samples[row['row']])['median_ms']} for row in rows]
    return [{**row, 'times_copy': median_ratio(samples[row['row']], samples['copy'])} for row in rows]


def backward_of(op: Callable, arguments: tuple) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns a function that computes the gradients of all tensors among the arguments, of a graph that is kept."""
    leaves = [value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments]
    out = op(*leaves)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True)


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


def op_cases(args: argparse.Namespace, E: int, R: int, H: int, W: int) -> dict[str, tuple[Callable, tuple]]:
    """Returns each op with random arguments, of the values that a model has at the start of training."""
    from mmspatialmamba.ops.selective_scan.orders import ORDERS

    ops = torch.ops.mmspatialmamba
    generator = torch.Generator().manual_seed(0)
    dtype, N = DTYPES[args.dtype], args.batch

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(args.device, dtype)

    u, uz, steps = (
        normal(N, H, W, E, dtype=dtype),
        normal(N, H, W, 2 * E, dtype=dtype),
        normal(N, H, W, R + 2, dtype=dtype),
    )
    step_size = (normal(E, R) * R**-0.5, normal(E) - 4)
    A, ones, taps = -torch.ones(E, device=args.device), torch.ones(E, device=args.device), normal(25, E) / 5
    delta = torch.nn.functional.softplus(normal(N, H * W, E) - 4).to(dtype)
    kernels, bias = normal(E, 1, 3, 3) / 3, normal(E)
    dt, B, C = steps.split((R, 1, 1), -1)
    half = u[..., : E // 2].contiguous()
    four = tuple(ORDERS)[:4]
    orders = [integer for name in four for integer in ORDERS[name](H, W)]
    of_orders = normal(N, H, W, 4, R + 2, dtype=dtype).split((R, 1, 1), -1)
    order_parameters = (*(torch.stack([x] * 4) for x in step_size), A.repeat(4, 1)[..., None], ones.repeat(4, 1))
    return {
        'structure_aware_ssm': (ops.structure_aware_ssm, (u, dt, B, C, *step_size, A, ones, taps)),
        'scan_states': (ops.scan_states, (u.flatten(1, 2), delta, A, B.flatten(1, 2))),
        'selective_scan in four orders': (ops.selective_scan.orders, (u, *of_orders, *order_parameters, orders)),
        'state_fusion': (ops.state_fusion, (u, taps)),
        'gated_norm': (ops.gated_norm, (u, uz[..., E:], ones, bias, 1e-5)),
        'depthwise_conv with SiLU, of a slice': (
            ops.depthwise_conv, (uz[..., :E], kernels, bias, 1, 'silu', False, False),
        ),
        'depthwise_conv with the residual': (
            ops.depthwise_conv, (half, kernels[: E // 2], bias[: E // 2], 1, 'none', False, True),
        ),
        'depthwise_conv of stride 2 with ReLU': (
            ops.depthwise_conv, (uz, kernels.repeat(2, 1, 1, 1), bias.repeat(2), 2, 'relu', True, False),
        ),
    }  # fmt: skip


def check_parity(name: str, op: Callable, arguments: tuple) -> None:
    """Raises if the op or its gradients differ from the reference in float64: nothing is timed then.

    Float64 is the reference's on every device that has a compiled implementation for the other dtypes, but the CPU,
    whose kernels in float64 the tests compare with it.
    """
    doubles = tuple(value.double() if isinstance(value, torch.Tensor) else value for value in arguments)
    found = (op(*arguments), *backward_of(op, arguments)())
    expected = (op(*doubles), *backward_of(op, doubles)())
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        error = ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCES[arguments[0].dtype]:
            part = 'the output' if index == 0 else f'gradient {index}'
            raise ValueError(
                f'{name}: {part} differs from the reference by {error:.1e}, more than '
                f'{TOLERANCES[arguments[0].dtype]:.0e}'
            )


def build_spatial_mamba(arch: str, fused: bool = False) -> torch.nn.Module:
    from mmspatialmamba import SpatialMamba

    return SpatialMamba(arch, fused=fused)


def build_peer(label: str, size: tuple[int, int]) -> torch.nn.Module:
    """Builds a peer that returns its maps, of mmdet or mmpretrain, else of timm, else of torchvision.

    Raises:
        ImportError: None of them is installed.
    """
    toolboxes = {
        'swin_t': ('mmdet.models.backbones', 'SwinTransformer',
                   {'embed_dims': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24), 'drop_path_rate': 0.2}),
        'resnet_50': ('mmdet.models.backbones', 'ResNet', {'depth': 50}),
        'convnext_t': ('mmpretrain.models.backbones', 'ConvNeXt',
                       {'arch': 'tiny', 'out_indices': (0, 1, 2, 3), 'gap_before_final_norm': False}),
    }  # fmt: skip
    module, attribute, options = toolboxes[label]
    errors = []
    try:
        return getattr(importlib.import_module(module), attribute)(**options)
    except ImportError as error:
        errors.append(f'{module}: {error}')
    try:
        timm = importlib.import_module('timm')
        name = {'swin_t': 'swin_tiny_patch4_window7_224', 'resnet_50': 'resnet50', 'convnext_t': 'convnext_tiny'}[label]
        options = {'img_size': size, 'drop_path_rate': 0.2} if label == 'swin_t' else {}
        return timm.create_model(name, features_only=True, **options)
    except ImportError as error:
        errors.append(str(error))
    try:
        models = importlib.import_module('torchvision.models')
        trunks = {
            'swin_t': lambda: models.swin_t().features,
            'resnet_50': lambda: torch.nn.Sequential(*list(models.resnet50().children())[:-2]),
            'convnext_t': lambda: models.convnext_tiny().features,
        }
        return LastMap(trunks[label]())
    except ImportError as error:
        errors.append(str(error))
    raise ImportError('; '.join(errors))


class LastMap(torch.nn.Module):
    """Returns what a trunk returns as a tuple of one map."""

    def __init__(self, trunk: torch.nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.trunk(x),)


def build_vmamba(arch: str) -> torch.nn.Module:
    from mmspatialmamba import VMamba

    return VMamba(arch)


MODELS: dict[str, Callable[[tuple[int, int]], torch.nn.Module]] = {
    'spatial_mamba_t': lambda size: build_spatial_mamba('tiny'),
    'spatial_mamba_t_fused': lambda size: build_spatial_mamba('tiny', fused=True),
    'spatial_mamba_s': lambda size: build_spatial_mamba('small'),
    'spatial_mamba_b': lambda size: build_spatial_mamba('base'),
    'vmamba_t': lambda size: build_vmamba('tiny'),
    'vmamba_s': lambda size: build_vmamba('small'),
    'vmamba_b': lambda size: build_vmamba('base'),
    'swin_t': lambda size: build_peer('swin_t', size),
    'resnet_50': lambda size: build_peer('resnet_50', size),
    'convnext_t': lambda size: build_peer('convnext_t', size),
}
"""Builders of the rows, which take the size of the images."""


def build(name: str, size: tuple[int, int]) -> torch.nn.Module:
    """Builds a model by its name in ``MODELS``, or by MODULE:CALLABLE."""
    if name in MODELS:
        return MODELS[name](size)
    module, _, attribute = name.partition(':')
    if not attribute:
        raise ValueError(f'--baseline must be MODULE:CALLABLE, got {name!r}')
    return getattr(importlib.import_module(module), attribute)()


def step(model: torch.nn.Module, x: torch.Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs the model once: forward, or forward, backward and an update."""
    dtype = DTYPES[args.dtype]
    enabled = dtype != torch.float32
    device = x.device.type
    if args.mode == 'inference':
        model.eval()

        def run():
            # A captured graph may not take a weight's cast from autocast's cache.
            with torch.inference_mode(), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
                return model(x)
    else:
        model.train()
        # One launch for many parameters, and a step counter on the device, which a captured graph needs.
        options = {} if device == 'cpu' else {'fused': True, 'capturable': True}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **options)
        # Random ones: a loss such as the mean square, which norms keep constant, leaves gradients that are denormal
        # numbers, on which a CPU takes many times as long.
        gradients = []

        def run():
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=enabled):
                outputs = model(x)
            outputs = tuple(out for out in outputs if out.requires_grad)
            if not gradients:
                gradients.extend(1e-3 * torch.randn_like(out) for out in outputs)
            torch.autograd.backward(outputs, gradients)
            optimizer.step()

    return run


def benchmark_backbones(args: argparse.Namespace) -> list[dict]:
    """Returns a row for each size and model, with time, peak memory and ratios to the first model."""
    rows = []
    for text in args.sizes:
        size = parse_size(text)
        x = torch.randn((args.batch, 3, *size), generator=torch.Generator().manual_seed(0)).to(args.device)
        candidates = {}
        for name in (*args.models, *args.baselines):
            try:
                candidates[name] = step(build(name, size).to(args.device), x, args)
            except (ImportError, RuntimeError) as error:
                print(f'{name}: left out, it cannot be imported ({error})')
        if not candidates:
            sys.exit('nothing to measure: none of the models can be imported')
        kernels = {}
        samples = measure(candidates, args.device, args.rounds, kernels=kernels)
        first = samples[next(iter(samples))]
        for name, found in samples.items():
            row = {'size': text, 'row': name, **summarise(found), 'first_row_in_it': median_ratio(first, found)}
            if args.device != 'cpu':
                replay = captured(candidates[name], torch.cuda.Stream(args.device))
                replays = measure({name: replay}, args.device, args.rounds)[name]
                row |= {'graph_ms': summarise(replays)['median_ms'], 'kernels': kernels.get(name, 0)}
            rows.append({**row, 'peak_memory_MiB': peak_memory(name, tuple(x.shape), args)})
            if args.profile:
                print_profile(name, candidates[name], args.device)
    return rows


@dataclass(frozen=True)
class Sample:
    """One timed run, in seconds: of the device, and of the processor that enqueued it (on a CPU the same)."""

    time: float
    enqueue: float


def measure(
    candidates: dict[str, Callable], device: str, rounds: int, cold: bool = False, kernels: dict | None = None
) -> dict[str, list[Sample]]:
    """Times the candidates in turn, ``rounds`` times each after the warm-ups.

    Args:
        candidates: What is timed, by its name.
        device: Device on which they run.
        rounds: Number of counted runs of each.
        cold: Whether the second-level cache of a GPU is written over before each run.
        kernels: Takes the number of kernels that Triton compiled or loaded for each candidate.
    """
    samples = {name: [] for name in candidates}
    time_run = _time_on_cpu if device == 'cpu' else _TimeOnGpu(device, cold)
    warm_ups = WARM_UPS[torch.device(device).type]
    for count in range(warm_ups + rounds):
        for name, run in candidates.items():
            with _counted_kernels(kernels, name):
                sample = time_run(run)
            if count >= warm_ups:
                samples[name].append(sample)
        print(f'\rround {max(0, count + 1 - warm_ups)} of {rounds}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def _time_on_cpu(run: Callable) -> Sample:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Sample(seconds, seconds)


class _TimeOnGpu:
    """Times a run by events on the device, whose clock leaves out how long the processor waits for it."""

    def __init__(self, device: str, cold: bool):
        self.device = device
        self.dirty = torch.empty(CACHE_BYTES if cold else 0, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable) -> Sample:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.dirty.zero_()
        begin.record()
        start = time.perf_counter()
        run()
        enqueue = time.perf_counter() - start
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end) / 1e3, enqueue)


@contextlib.contextmanager
def _counted_kernels(kernels: dict | None, name: str) -> Iterator[None]:
    """Adds to ``kernels[name]`` how many kernels Triton compiles, or loads from its cache on disk, meanwhile."""
    if kernels is None or importlib.util.find_spec('triton') is None:
        yield
        return
    import triton

    def count(*_, **__):
        kernels[name] = kernels.get(name, 0) + 1

    before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, count
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before


def captured(run: Callable, stream: torch.cuda.Stream) -> Callable[[], None]:
    """Returns the replay of a CUDA graph of ``run``, captured on ``stream`` after a run there."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def print_profile(name: str, run: Callable, device: str) -> None:
    """Prints the launches of one run and its 25 most expensive kernels, or functions on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_cpu = device == 'cpu'
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as recorded:
        run()
        if not on_cpu:
            torch.cuda.synchronize(device)
    key = 'self_cpu_time_total' if on_cpu else 'self_device_time_total'
    events = sorted((e for e in recorded.key_averages() if getattr(e, key)), key=lambda e: -getattr(e, key))
    total = sum(getattr(event, key) for event in events) / 1e3
    print(f'\n{name}: {sum(event.count for event in events)} launches, {total:.2f} ms')
    for event in events[:25]:
        print(f'  {event.key[:80]:80} {event.count:5} x  {getattr(event, key) / 1e3:9.3f} ms')


def summarise(samples: list[Sample]) -> dict[str, float]:
    """Returns median and quartiles in milliseconds, and the median of enqueuing."""
    times = [sample.time for sample in samples]
    low, median, high = statistics.quantiles(times, n=4, method='inclusive') if len(times) > 1 else times * 3
    enqueue = statistics.median(sample.enqueue for sample in samples)
    return {
        'median_ms': 1e3 * median, 'quartile_1_ms': 1e3 * low, 'quartile_3_ms': 1e3 * high, 'enqueue_ms': 1e3 * enqueue,
    }  # fmt: skip


def median_ratio(samples: list[Sample], others: list[Sample]) -> float:
    """Returns the median over the rounds of the ratio of two candidates, which drifts of the machine leave alone."""
    return statistics.median(one.time / other.time for one, other in zip(samples, others, strict=True))


def peak_memory(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    """Returns the peak memory that the first run adds to the model's own, in MiB; on a CPU in a new process."""
    if args.device != 'cpu':
        return _peak_memory(name, shape, args)
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (name, shape, args))


def _peak_memory(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    run = step(build(name, shape[2:]).to(args.device), torch.randn(shape, device=args.device), args)
    if args.device == 'cpu':
        before = _memory_KiB('VmRSS')
        run()
        return (_memory_KiB('VmHWM') - before) / 1024
    torch.cuda.reset_peak_memory_stats()
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
