"""What every test run prints, the op implementations that ran, and what older versions of PyTorch cannot run."""

import pytest
import torch
from mmspatialmamba.ops import backends
from mmspatialmamba.ops.compat import VERSION

NEEDS = (
    # in the address of a test, one of its parameters, the PyTorch that it needs, what is missing before
    ('opcheck', None, (2, 4), 'torch.library.opcheck'),
    ('test_no_bias_is_a_bias_of_zero', None, (2, 4), 'torch.library.opcheck'),
    ('test_mlp.py::test_compiles', None, (2, 2), 'dynamo of 2.1 does not know torch.promote_types'),
    ('test_ssm_layer.py::test_compiles', None, (2, 2), 'dynamo of 2.1 does not know torch.promote_types'),
    ('test_downsample.py::test_compiles', None, (2, 2), 'fake tensors of 2.1 are of the meta device to an op'),
    ('test_selective_scan.py::test_compiles', None, (2, 2), 'torch.compile with dynamic sizes'),
    ('test_selective_scan.py::test_an_exported_program', None, (2, 6), 'torch.export.Dim.DYNAMIC'),
    ('test_gelu.py::test_on_a_gpu', None, (2, 6), 'fake tensors of a GPU that is not there'),
    ('test_vmamba.py::test_under_autocast', torch.float16, (2, 4), 'autocast to float16 on a CPU'),
    ('test_mlp.py', torch.float16, (2, 2), 'products in float16 on a CPU'),
    ('test_ssm_layer.py', torch.float16, (2, 2), 'products in float16 on a CPU'),
    ('test_depthwise_conv.py', torch.float16, (2, 2), 'convolutions in float16 on a CPU'),
    ('test_downsample.py', torch.float16, (2, 2), 'convolutions in float16 on a CPU'),
    ('test_gradients.py', torch.float16, (2, 2), 'products and convolutions in float16 on a CPU'),
)


def pytest_report_header():
    """Names the implementation of each device, since a test of a missing one is skipped."""
    return [
        f'ops on {backend.device}: {backend.implementation}' + (f' ({backend.reason})' if backend.reason else '')
        for backend in backends().values()
    ]


def pytest_collection_modifyitems(items):
    """Skips what this PyTorch cannot run, with the version that can."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        for address, parameter, version, what in NEEDS:
            known = parameter is None or any(value is parameter for value in parameters)
            if version > VERSION and address in item.nodeid and known:
                item.add_marker(pytest.mark.skip(reason=f'needs PyTorch {version[0]}.{version[1]}: {what}'))
