"""Counts what a block of the backbone launches on a GPU, forward and backward, and what the launches touch.

Example:
    python tools/launch_report.py --shape 800 1280 --batch 2 --by-kernel

Needs Triton and no GPU: a block of the tiny model runs on tensors without data, under autocast in bfloat16 as a GPU
would have it. PyTorch's operators are counted as the dispatcher sees them, but for views and allocations, the Triton
kernels as their launchers call them. An operator of PyTorch may be several kernels; a tensor counts once, also if it is
read and written in place, or taken without being touched. Time is no part of it.
"""

import argparse
import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from mmspatialmamba.ops import partial_sums
from mmspatialmamba.ops.backends import TRITON_OPS
from mmspatialmamba.ops.library import NAMESPACE, REFERENCES
from mmspatialmamba.ops.triton_backend import IMPLEMENTATIONS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmspatialmamba.models.block import Block

MIB = 2**20
FREE = ('empty', 'empty_like', 'new_empty', 'empty_strided', '_unsafe_view')
"""Operators that allocate, and a view that its schema does not call one."""
LIKE = ('new_ones', 'new_zeros', 'new_full', 'ones_like', 'zeros_like', 'full_like')
"""Operators that make a tensor of the form of another one, without reading it."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: Name of PyTorch's operator or of the Triton kernel.
        bytes: Size of the tensors that it takes and returns.
    """

    kernel: str
    bytes: int


class Recorder(TorchDispatchMode):
    """Records what reaches the dispatcher; the package's ops run as on a GPU, by their Triton
    implementation or, without one, by PyTorch's operators.

    Attributes:
        launches: What was launched, in order.
    """

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            name = func.name().partition('::')[2]
            compute = IMPLEMENTATIONS[name][0] if name in IMPLEMENTATIONS else REFERENCES[name]
            with self:
                return compute(*args)
        outputs = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE):
            self.add(str(func), outputs if name in LIKE else (args, kwargs, outputs))
        return outputs

    def add(self, kernel: str, tensors: object) -> None:
        """Adds a launch that takes or returns these tensors, in any nesting."""
        leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
        places = {(leaf.untyped_storage()._cdata, leaf.storage_offset(), leaf.numel()): leaf for leaf in leaves}
        touched = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in places.values())
        self.launches.append(Launch(kernel, touched))


class Kernel:
    """Stands for a Triton kernel and records its launches."""

    def __init__(self, name: str, recorder: Recorder):
        self.name, self.recorder = name, recorder

    def __getitem__(self, grid):
        return lambda *args, **constants: self.recorder.add(self.name, args)


class Autocast(TorchFunctionMode):
    """Does to linear layers of tensors without data what autocast does to those of a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = [x.to(torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_kernels(recorder: Recorder) -> Iterator[None]:
    """Replaces every Triton kernel that is launched by one that records it."""
    modules = [partial_sums, *(importlib.import_module(f'mmspatialmamba.ops.{op}.triton_kernels') for op in TRITON_OPS)]
    replaced = []
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and not name.startswith('_'):
                    replaced.append((module, name, value))
                    setattr(module, name, Kernel(name, recorder))
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def record_block(
    channels: int, grid: tuple[int, int], batch: int, drop_path_rate: float = 0.0
) -> tuple[list[Launch], list[Launch]]:
    """Runs a block of the backbone under autocast in bfloat16.

    Args:
        channels: Number of channels d.
        grid: Rows and columns of the map.
        batch: Number of images.
        drop_path_rate: Of the block.

    Returns:
        The launches of forward and of backward.
    """
    with torch.device('meta'):
        block = Block(channels, drop_path_rate)
    x = torch.empty(batch, *grid, channels, dtype=torch.bfloat16, device='meta').requires_grad_()
    recorder = Recorder()
    with recorded_kernels(recorder), recorder:
        with Autocast():
            out = block(x)
        forward = len(recorder.launches)
        out.backward(torch.empty_like(out))
    return recorder.launches[:forward], recorder.launches[forward:]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--channels', type=int, default=64, help='of the first stage')
    parser.add_argument('--shape', type=int, nargs=2, default=(800, 1280), help='height and width of the image')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--by-kernel', action='store_true', help='a row for each kernel of the first stage too')
    args = parser.parse_args()
    for stage in range(4):
        grid = tuple(-(-size // 2 ** (stage + 2)) for size in args.shape)
        passes = record_block(args.channels * 2**stage, grid, args.batch, drop_path_rate=0.1)
        for name, launches in zip(('forward', 'backward'), passes, strict=True):
            touched = sum(launch.bytes for launch in launches) / MIB
            print(f'stage {stage + 1} {name:8} {len(launches):3} launches {touched:7.1f} MiB')
            if args.by_kernel and stage == 0:
                counts, sizes = Counter(), Counter()
                for launch in launches:
                    counts[launch.kernel] += 1
                    sizes[launch.kernel] += launch.bytes
                for kernel, size in sizes.most_common():
                    print(f'    {kernel:40} {counts[kernel]:3} {size / MIB:8.1f} MiB')


if __name__ == '__main__':
    main()
