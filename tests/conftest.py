"""What every test run prints: the op implementations that ran."""

from mmspatialmamba.ops import backends


def pytest_report_header():
    """Names the implementation of each device, since a test of a missing one is skipped."""
    return [
        f'ops on {backend.device}: {backend.implementation}' + (f' ({backend.reason})' if backend.reason else '')
        for backend in backends().values()
    ]
