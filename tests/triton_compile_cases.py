"""Compiles every launch configuration of the Triton kernels for one compute capability and prints a JSON row for each.

Started by `test_ops_triton.py` with 80 or 90; needs no GPU. The launchers run on tensors without data, their kernels
replaced by recorders: what is compiled is what they would launch. A row has kernel, dtype, rank, warps, registers,
spilled bytes, shared memory and the grid.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from mmspatialmamba.ops.depthwise_conv import triton_kernels as triton_conv
from mmspatialmamba.ops.fusion_taps import triton_kernels as triton_taps
from mmspatialmamba.ops.gated_norm import triton_kernels as triton_gated_norm
from mmspatialmamba.ops.layer_norm import triton_kernels as triton_layer_norm
from mmspatialmamba.ops.scan_states import triton_kernels as triton_scan
from mmspatialmamba.ops.state_fusion import triton_kernels as triton_fusion
from mmspatialmamba.ops.triton_backend import IMPLEMENTATIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    triton_scan: (
        'carry_kernel',
        'combine_kernel',
        'scan_kernel',
        'scan_backward_kernel',
        'step_size_kernel',
        'step_size_backward_kernel',
    ),
    triton_conv: ('conv_kernel', 'conv_parameters_kernel', 'conv_adjoint_kernel'),
    triton_gated_norm: ('gated_norm_kernel', 'gated_norm_backward_kernel'),
    triton_taps: ('taps_kernel', 'taps_backward_kernel'),
    triton_layer_norm: ('layer_norm_kernel', 'layer_norm_backward_kernel'),
    triton_fusion: ('fusion_kernel', 'taps_gradient_kernel', 'adjoint_kernel', 'adjoint_border_kernel'),
}
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
SIZES = ('tiles', 'E')
CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


def recorded_launches():
    """Returns the launches of all ops at shapes of the variants' stages, each configuration once."""
    launches = []
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Recorder(getattr(module, name), launches))

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device='meta')

    for dtype, N, (H, W), E, R in (
        (torch.float32, 1, (200, 320), 128, 4),
        (torch.bfloat16, 1, (200, 320), 128, 4),
        (torch.float16, 1, (200, 320), 128, 4),
        (torch.bfloat16, 1, (100, 160), 256, 8),
        (torch.float32, 1, (100, 160), 480, 15),  # the largest rank whose projection is part of the scan
        (torch.bfloat16, 1, (50, 80), 512, 16),
        (torch.bfloat16, 32, (14, 14), 1024, 32),  # few columns
        (torch.bfloat16, 4, (32, 40), 1536, 48),
        (torch.float32, 4, (32, 40), 1536, 48),
        (torch.float32, 1, (1, 1), 1, 1),
    ):
        dt, B, C = empty(N, H, W, R + 2, dtype=dtype).split((R, 1, 1), -1)
        arguments = (empty(N, H, W, E, dtype=dtype), dt, B, C, empty(E, R), empty(E), empty(E), empty(E), empty(25, E))
        IMPLEMENTATIONS['structure_aware_ssm'][0](*arguments)
        IMPLEMENTATIONS['structure_aware_ssm_backward'][0](arguments[0], *arguments)
    for dtype in POINTERS:
        u, B = empty(1, 64000, 128, dtype=dtype), empty(1, 64000, 1, dtype=dtype)
        IMPLEMENTATIONS['scan_states'][0](u, u, empty(128), B)
        IMPLEMENTATIONS['scan_states_backward'][0](u, u, u, empty(128), B)
    for dtype, N, (H, W), E in (
        (torch.float32, 1, (200, 320), 128),
        (torch.bfloat16, 1, (200, 320), 128),
        (torch.float16, 1, (200, 320), 128),
        (torch.bfloat16, 1, (25, 40), 1024),  # backward with a tile a program: its loop disappears
        (torch.bfloat16, 4, (32, 40), 1536),
        (torch.float32, 4, (32, 40), 1536),
        (torch.float32, 1, (32, 40), 3072),  # twice the width of the largest published model
        (torch.float32, 1, (1, 1), 1),
    ):
        y, z = empty(N, H, W, E, dtype=dtype), empty(N, H, W, 2 * E, dtype=dtype)[..., E:]
        IMPLEMENTATIONS['gated_norm'][0](y, z, empty(E), empty(E), 1e-5)
        for with_out in (False, True):
            IMPLEMENTATIONS['gated_norm_backward'][0](y, y, z, empty(E), empty(E), 1e-5, with_out)
    for dtype in POINTERS:
        kernels = [empty(128, 1, 3, 3, dtype=dtype)] * 3
        taps = IMPLEMENTATIONS['fusion_taps'][0](*kernels, empty(3, dtype=dtype))
        IMPLEMENTATIONS['fusion_taps_backward'][0](taps, *kernels, empty(3, dtype=dtype))
    for dtype, out_dtype, tokens, d in (
        (torch.float32, torch.float32, 64000, 64),
        (torch.bfloat16, torch.bfloat16, 64000, 64),
        (torch.float16, torch.float16, 64000, 64),
        (torch.float32, torch.bfloat16, 64000, 96),
        (torch.bfloat16, torch.bfloat16, 1000, 512),  # backward with a tile a program: its loop disappears
        (torch.bfloat16, torch.bfloat16, 4000, 768),
        (torch.float32, torch.float32, 4000, 3072),
        (torch.float32, torch.float32, 1, 1),
    ):
        x, out, statistics = empty(tokens, d, dtype=dtype), empty(tokens, d, dtype=out_dtype), empty(tokens, 1)
        IMPLEMENTATIONS['layer_norm'][0](x, empty(d), empty(d), 1e-5, out_dtype)
        IMPLEMENTATIONS['layer_norm_backward'][0](out, x, statistics, statistics, empty(d), empty(d))
    for dtype, N, (H, W), E, options in (
        (torch.float32, 1, (200, 320), 128, (1, 'silu', False, False)),
        (torch.bfloat16, 1, (200, 320), 128, (1, 'silu', False, False)),
        (torch.float16, 1, (200, 320), 128, (1, 'silu', False, False)),
        (torch.bfloat16, 1, (200, 320), 64, (1, 'none', False, True)),
        (torch.float32, 2, (200, 320), 512, (2, 'relu', True, False)),
        (torch.bfloat16, 2, (200, 320), 512, (2, 'relu', True, False)),
        (torch.bfloat16, 1, (25, 40), 1024, (1, 'silu', False, False)),  # a tile a program: its loop disappears
        (torch.bfloat16, 2, (200, 320), 96, (1, 'none', False, True)),  # base: the narrower block
        (torch.float32, 1, (1, 1), 1, (1, 'silu', False, True)),
    ):
        x = empty(N, H, W, 2 * E, dtype=dtype)[..., :E]
        y = IMPLEMENTATIONS['depthwise_conv'][0](x, empty(E, 1, 3, 3), empty(E), *options)
        IMPLEMENTATIONS['depthwise_conv_backward'][0](y, x, empty(E, 1, 3, 3), empty(E), *options)
    h = empty(1, 200, 320, 128)
    IMPLEMENTATIONS['state_fusion'][0](h, empty(25, 128))
    IMPLEMENTATIONS['state_fusion_backward'][0](h, h, empty(25, 128))
    return launches


def specialize(kernel, args, kwargs):
    """Returns signature, constants, attributes and options of a launch as the just-in-time compiler chooses them."""
    signature, constants, attributes = {}, {}, {}
    options = {key: kwargs[key] for key in kwargs if key not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
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
    return signature, constants, attributes, options


def resources(cubin):
    """Returns registers a thread and bytes spilled, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, '--dump-resource-usage', file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf'{key}:(\d+)', text)[1]) for key in ('REG', 'STACK', 'LOCAL'))
    return registers, stack + local


def main(capability):
    seen = set()
    for kernel, grid, args, kwargs in recorded_launches():
        signature, constants, attributes, options = specialize(kernel, args, kwargs)
        # A size of 1 is a constant too: it removes a loop, or meets rules of the language that no number meets.
        launched = {name: value for name, value in constants.items() if name in kwargs or name in SIZES}
        pointers = tuple(value for value in signature.values() if value.startswith('*'))
        key = (kernel.fn.__name__, pointers, *launched.items())
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget('cuda', capability, 32),
            options=options,
        )
        registers, spilled = resources(compiled.asm['cubin'])
        dtypes = {pointer.removeprefix('*') for pointer in pointers}
        row = {
            'kernel': kernel.fn.__name__,
            'dtype': next(iter(dtypes - {'fp32'}), 'fp32'),
            'constants': launched,
            'warps': options['num_warps'],
            'registers': registers,
            'spilled': spilled,
            'shared': compiled.metadata.shared,
            'grid': grid[0],
        }
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main(int(sys.argv[1]))
