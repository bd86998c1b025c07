"""Compiles every launch configuration of the Triton kernels for one compute capability and prints a JSON row for each.

Started by `test_ops_triton.py` with 80 or 90; needs no GPU. The launchers run on tensors without data: what is compiled
is what they would launch. A row has kernel, dtype, rank, warps, registers, spilled bytes and shared memory.
"""

import json
import sys

import torch
from mmspatialmamba.ops.selective_scan.orders import ORDERS
from mmspatialmamba.ops.triton_backend import IMPLEMENTATIONS
from tool_runner import load_tool

report = load_tool('kernel_report')
SIZES = ('tiles', 'E')
FOUR = ('rows', 'columns', 'rows_backwards', 'columns_backwards')


def call_all():
    """Calls all ops at shapes of the variants' stages."""

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
    for dtype in report.POINTERS:
        u, B = empty(1, 64000, 128, dtype=dtype), empty(1, 64000, 1, dtype=dtype)
        IMPLEMENTATIONS['scan_states'][0](u, u, empty(128), B)
        IMPLEMENTATIONS['scan_states_backward'][0](u, u, u, empty(128), B)
    for dtype, N, (H, W), E, R, S, names in (
        (torch.float32, 1, (200, 320), 96, 6, 1, FOUR),
        (torch.bfloat16, 1, (200, 320), 96, 6, 1, FOUR),
        (torch.float16, 1, (200, 320), 96, 6, 1, FOUR),
        (torch.bfloat16, 2, (25, 40), 2048, 64, 1, FOUR),
        (torch.float32, 2, (25, 40), 2048, 64, 1, FOUR),
        (torch.bfloat16, 1, (14, 14), 384, 24, 16, ('rows', 'columns')),
        (torch.float32, 1, (1, 1), 1, 1, 1, ('rows',)),
    ):
        K = len(names)
        u, packed = empty(N, H, W, E, dtype=dtype), empty(N, H, W, K, R + 2 * S, dtype=dtype)
        parameters = empty(K, E, R), empty(K, E), empty(K, E, S), empty(K, E)
        orders = [integer for name in names for integer in ORDERS[name](H, W)]
        arguments = (u, *packed.split((R, S, S), -1), *parameters, orders)
        IMPLEMENTATIONS['selective_scan.orders'][0](*arguments)
        IMPLEMENTATIONS['selective_scan_backward.orders'][0](u, *arguments)
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
    for dtype in report.POINTERS:
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


def main(capability):
    with report.recorded() as launches:
        call_all()
    seen = set()
    for launch in launches:
        signature, constants, _ = report.specialize(launch)
        constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
        # A size of 1 is a constant too: it removes a loop, or meets rules of the language that no number meets.
        kept = {name: value for name, value in constants.items() if name in constexprs or name in SIZES}
        pointers = tuple(value for value in signature.values() if value.startswith('*'))
        key = (launch.name, pointers, *kept.items(), launch.options['num_warps'])
        if key in seen:
            continue
        seen.add(key)
        compiled = report.compile_ahead(launch, capability)
        dtypes = {pointer.removeprefix('*') for pointer in pointers}
        row = {
            'kernel': launch.kernel.fn.__name__,
            'dtype': next(iter(dtypes - {'fp32'}), 'fp32'),
            'constants': kept,
            'warps': launch.options['num_warps'],
            'registers': compiled.registers,
            'spilled': compiled.spilled,
            'shared': compiled.shared,
        }
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main(int(sys.argv[1]))
