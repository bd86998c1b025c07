"""Prints what the compiler makes of the Triton kernels of the core, and the time that no GPU can go below with it.

Example:
    python tools/kernel_report.py
    python tools/kernel_report.py --stages 1 4 --kernels scan fusion --dtype float32
    python tools/kernel_report.py --op selective_scan

Needs Triton and no GPU: the launchers run on tensors without data, what they would launch is compiled ahead of time for
compute capability 9.0 (H100, H200), and the machine code is read. For each kernel and stage of the tiny variant at
800x1280, batch 2:

    regs, spilled   registers of a thread, and bytes of it that have to go to memory
    warps           warps that fit on a multiprocessor at a time, by registers, shared memory and programs
    instr           instructions that run for each value of the map (N, H, W, E), loops counted as often as they run
    bytes           bytes that the kernel has to move for each value, each tensor once
    issue, memory   microseconds that these take at least: at four warp instructions for each clock and multiprocessor
                    (132 at 1.755 GHz), and at 3.0 TB/s

These are floors, not times. The loops of ``adjoint_border_kernel`` run as often as pixels lie on a border, which is
estimated. The launch that adds partial sums is not in the table: each of its programs runs another part of the code.
"""

import argparse
import contextlib
import importlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from mmspatialmamba.ops import partial_sums
from mmspatialmamba.ops.backends import TRITON_OPS
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from mmspatialmamba.ops.state_fusion.taps import RADIUS
from mmspatialmamba.ops.triton_backend import IMPLEMENTATIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = [partial_sums, *(importlib.import_module(f'mmspatialmamba.ops.{op}.triton_kernels') for op in TRITON_OPS)]
CORE, ORDERED = 'structure_aware_ssm', 'selective_scan'
STAGES = {
    CORE: (((200, 320), 128, 4, 2), ((100, 160), 256, 8, 4), ((50, 80), 512, 16, 8), ((25, 40), 1024, 32, 4)),
    ORDERED: (((200, 320), 96, 6, 2), ((100, 160), 192, 12, 2), ((50, 80), 384, 24, 8), ((25, 40), 768, 48, 2)),
}
"""Grid, inner channels, rank and number of blocks of the stages of tiny at 800x1280: of Spatial-Mamba, of VMamba."""
BATCH = 2
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
BINARIES = Path(triton.__file__).parent / 'backends/nvidia/bin'

MULTIPROCESSORS = 132
CLOCK = 1.755e9
"""Of an H100, in Hz."""
BANDWIDTH = 3.0e12
"""Bytes that an H100 copies in a second."""
BORDER_TRIPS = 1.56
"""Mean number of rows (or columns) that a border pixel gathers for a tap: 1, and |offset| more on one of four sides."""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: the kernel, the number of its programs, its arguments by name, and the options."""

    kernel: triton.JITFunction
    programs: int
    values: dict[str, object]
    options: dict[str, object]

    @property
    def name(self) -> str:
        """Name of the kernel, with its direction if it has two."""
        return self.kernel.fn.__name__ + (' (adjoint)' if self.values.get('ADJOINT') else '')


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch: registers, bytes spilled, shared memory and instructions in order."""

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    """First and last instruction of each loop."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches inside of the context, which are not done."""
    launches = []

    def record(kernel, programs, *arguments, **constants):
        names = kernel.arg_names
        options = {'enable_fp_fusion': True} | {key: value for key, value in constants.items() if key not in names}
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in constants.items() if k in names}
        launches.append(Launch(kernel, programs, values, options))

    kept = {module: module.launch for module in MODULES if hasattr(module, 'launch')}
    for module in kept:
        module.launch = record
    try:
        yield launches
    finally:
        for module, launch in kept.items():
            module.launch = launch


def specialize(launch: Launch) -> tuple[dict, dict, dict]:
    """Returns signature, constants and attributes of a launch as the just-in-time compiler chooses them."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        value = launch.values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name] = 'fp32'
            continue
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name] = 'constexpr'
            constants[name] = value
            continue
        else:
            signature[name] = 'i32' if value < 2**31 else 'i64'
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [['tt.divisibility', 16]]
    return signature, constants, attributes


def specialization(launch: Launch) -> str:
    """Returns what tells the compiled kernels of a run apart."""
    return repr((launch.kernel.fn.__name__, *specialize(launch), sorted(launch.options.items())))


def compile_ahead(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for a compute capability such as 90, and reads the machine code."""
    compiled = triton.compile(
        ASTSource(launch.kernel, *specialize(launch)),
        target=GPUTarget('cuda', capability, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = _run('cuobjdump', '--dump-resource-usage', file.name)
        code = _run('nvdisasm', '--print-code', file.name)
    registers, stack, local = (int(re.search(rf'{key}:(\d+)', usage)[1]) for key in ('REG', 'STACK', 'LOCAL'))
    return Compiled(registers, stack + local, compiled.metadata.shared, *_disassembled(code))


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / program, *arguments], capture_output=True, text=True, check=True).stdout


def _disassembled(code: str) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Returns the instructions, and the loops: what lies between a label and a later branch back to it."""
    instructions, labels, branches = [], {}, []
    for line in code.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w.*?)\s*;', line):
            if instruction[1] == 'NOP':
                continue
            if target := re.search(r'^BRA\b.*?`\((\.L_x_\d+)\)', instruction[1]):
                branches.append((len(instructions), target[1]))
            instructions.append(instruction[1])
    # The program ends with a branch to itself, which nothing reaches.
    loops = sorted((labels[label], at) for at, label in branches if labels[label] < at)
    return tuple(instructions), tuple(loops)


def trips(launch: Launch, compiled: Compiled) -> list[float]:
    """Returns how often each loop of a kernel runs, for each time that it is entered.

    Raises:
        RuntimeError: The machine code has other loops than the kernel's source lets expect.
    """
    values, count = launch.values, len(compiled.loops)
    lengths = [last - first for first, last in compiled.loops]
    name = launch.kernel.fn.__name__
    if name in ('carry_kernel', 'scan_kernel', 'scan_backward_kernel'):
        # Beside the loop over groups, there are loops over the tokens past the last group, of one chunk of an image.
        if not count:
            raise RuntimeError(f'{name}: expected a loop over groups of tokens in the machine code, found none')
        main = lengths.index(max(lengths))
        rest = values['L'] % values['GROUP'] / math.ceil(values['L'] / values['length'])
        return [values['length'] // values['GROUP'] if i == main else rest for i in range(count)]
    if name.startswith('orders_'):
        # Of each order a loop over blocks of components of dt and one over states. In backward the second, of the one
        # state here, is no loop, and there is another of the first kind.
        components = math.ceil(values['rank'] / values['BLOCK_R'])
        backward = name == 'orders_backward_kernel'
        loops = [components] * 2 if backward else [components, values['states']] * len(values['CODES'])
        if count != len(loops):
            raise RuntimeError(f'{name}: expected {len(loops)} loops in the machine code, found {count}')
        return loops
    expected: dict[str, tuple[Callable[[int], bool], float]] = {
        'combine_kernel': (lambda n: n == 1, math.ceil(values.get('chunks', 0) / values.get('BLOCK_CHUNKS', 1))),
        'step_size_kernel': (lambda n: n == 0, 1),
        'step_size_backward_kernel': (lambda n: n <= 1, values.get('tiles', 1)),
        'fusion_kernel': (lambda n: n <= 3, 2),
        'taps_gradient_kernel': (lambda n: n <= 3, 2),
        'adjoint_kernel': (lambda n: n <= 3, 2),
        'adjoint_border_kernel': (lambda n: n > 0, BORDER_TRIPS),
    }
    possible, number = expected[name]
    if not possible(count):
        raise RuntimeError(f'{name}: the machine code has {count} loops, which its source does not let expect')
    return [number] * count


def instructions_run(launch: Launch, compiled: Compiled) -> float:
    """Returns the instructions that a warp of the launch runs on average."""
    total = float(len(compiled.instructions))
    for (first, last), number in zip(compiled.loops, trips(launch, compiled), strict=True):
        # Of nested loops, which only the border has, the inner ones run once for nearly every pixel.
        inner = any(begin < first and last <= end for begin, end in compiled.loops)
        total += 0 if inner else (last - first + 1) * (number - 1)
    return total


def warps_resident(launch: Launch, compiled: Compiled) -> int:
    """Returns the warps that fit on a multiprocessor of compute capability 9.0 at a time."""
    warps = launch.options['num_warps']
    registers = 65536 // (warps * 32 * math.ceil(compiled.registers / 8) * 8)
    shared = 227 * 1024 // (compiled.shared + 1024)
    return warps * min(registers, shared, 32, 64 // warps)


def bytes_moved(launch: Launch) -> float:
    """Returns the bytes of a launch's tensors, each counted once; at the border, those of the pixels that it needs."""
    tensors = {id(value): value for value in launch.values.values() if isinstance(value, torch.Tensor)}
    share = 1.0
    if launch.kernel.fn.__name__ == 'adjoint_border_kernel':
        H, W = launch.values['H'], launch.values['W']
        share = 1 - max(0, H - 2 * RADIUS) * max(0, W - 2 * RADIUS) / (H * W)
    return share * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def launches_of_stage(stage: int, dtype: torch.dtype, op: str = CORE) -> tuple[list[Launch], list[Launch]]:
    """Returns the launches of the core of one block of a stage, forward and backward."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device='meta')

    (H, W), E, R, _ = STAGES[op][stage - 1]
    u = empty(BATCH, H, W, E, dtype=dtype)
    if op == CORE:
        packed = empty(BATCH, H, W, R + 2, dtype=dtype)
        arguments = (u, *packed.split((R, 1, 1), -1), empty(E, R), empty(E), empty(E), empty(E), empty(25, E))
        names = op, f'{op}_backward'
    else:
        packed = empty(BATCH, H, W, 4, R + 2, dtype=dtype)
        orders = [integer for name in tuple(ORDERS)[:4] for integer in ORDERS[name](H, W)]
        parameters = empty(4, E, R), empty(4, E), empty(4, E, 1), empty(4, E)
        arguments = (u, *packed.split((R, 1, 1), -1), *parameters, orders)
        names = f'{op}.orders', f'{op}_backward.orders'
    with recorded() as forward:
        IMPLEMENTATIONS[names[0]][0](*arguments)
    with recorded() as backward:
        IMPLEMENTATIONS[names[1]][0](u, *arguments)
    return forward, backward


def report(stage: int, dtype: torch.dtype, kernels: list[str], op: str = CORE) -> list[dict[str, object]]:
    """Returns a row for each launch of the core in one block of a stage whose kernel's name has one of the words."""
    (H, W), E, _, _ = STAGES[op][stage - 1]
    elements = BATCH * H * W * E
    rows = []
    for direction, launches in zip(('forward', 'backward'), launches_of_stage(stage, dtype, op), strict=True):
        for launch in launches:
            if launch.kernel is partial_sums.partial_sums_kernel:
                continue
            if kernels and not any(word in launch.name for word in kernels):
                continue
            compiled = compile_ahead(launch, 90)
            warp_instructions = instructions_run(launch, compiled) * launch.programs * launch.options['num_warps']
            rows.append(
                {
                    'stage': stage,
                    'direction': direction,
                    'kernel': launch.name,
                    'registers': compiled.registers,
                    'spilled': compiled.spilled,
                    'warps': warps_resident(launch, compiled),
                    'instructions': warp_instructions * 32 / elements,
                    'bytes': bytes_moved(launch) / elements,
                    'issue_us': 1e6 * warp_instructions / (4 * MULTIPROCESSORS * CLOCK),
                    'memory_us': 1e6 * bytes_moved(launch) / BANDWIDTH,
                }
            )
    return rows


def table(rows: list[dict[str, object]], op: str = CORE) -> str:
    """Returns the rows, and their sums for each stage and for all blocks, in Markdown."""
    lines = [
        '| stage | direction | kernel | regs | spilled | warps | instr | bytes | issue µs | memory µs |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        lines.append(
            '| {stage} | {direction} | {kernel} | {registers} | {spilled} | {warps} | {instructions:.0f} | {bytes:.1f}'
            ' | {issue_us:.1f} | {memory_us:.1f} |'.format_map(row)
        )
    for direction in ('forward', 'backward'):
        totals = {'issue_us': 0.0, 'memory_us': 0.0}
        for stage in sorted({row['stage'] for row in rows}):
            own = [row for row in rows if (row['stage'], row['direction']) == (stage, direction)]
            sums = {key: sum(row[key] for row in own) for key in ('instructions', 'bytes', 'issue_us', 'memory_us')}
            lines.append(
                f'| {stage} | {direction} | {len(own)} launches | | | | {sums["instructions"]:.0f} |'
                f' {sums["bytes"]:.1f} | {sums["issue_us"]:.0f} | {sums["memory_us"]:.0f} |'
            )
            for key in totals:
                totals[key] += STAGES[op][stage - 1][3] * sums[key]
        lines.append(f'| all blocks | {direction} | | | | | | | {totals["issue_us"]:.0f} | {totals["memory_us"]:.0f} |')
    return '\n'.join(lines)


def main() -> None:
    """Prints the table for the stages and kernels of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stages', type=int, nargs='+', choices=range(1, 5), default=[1, 2, 3, 4])
    parser.add_argument('--kernels', nargs='+', default=[], metavar='WORD', help='only kernels whose name has a word')
    parser.add_argument('--dtype', choices=('bfloat16', 'float16', 'float32'), default='bfloat16')
    parser.add_argument('--op', choices=(CORE, ORDERED), default=CORE, help='the core of Spatial-Mamba, or of VMamba')
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    rows = [row for stage in args.stages for row in report(stage, dtype, args.kernels, args.op)]
    if not rows:
        parser.error(f'no kernel has a name with {" or ".join(args.kernels)}')
    print(f'Triton {triton.__version__}, {args.dtype}, compute capability 9.0\n')
    print(table(rows, args.op))


if __name__ == '__main__':
    main()
