"""Programs that were exported under an op's old schema: they raise by name, whatever the name means now.

`selective_scan` alone was what is `scan_states` now; today's op of that name is `selective_scan.orders`.
"""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from mmspatialmamba.ops.library import RETIRED

import mmspatialmamba  # noqa: F401

OLD_VERSION = """
    import sys, warnings
    import torch

    library = torch.library.Library('mmspatialmamba', 'DEF')
    library.define('selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B) -> Tensor')
    library.impl('selective_scan', lambda u, delta, A, B: u * delta * B + A, 'CompositeExplicitAutograd')
    torch.library.register_fake('mmspatialmamba::selective_scan', lambda u, *_: torch.empty_like(u), lib=library)

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B):
            return torch.ops.mmspatialmamba.selective_scan(u, delta, A, B) + 1

    inputs = (torch.ones(2, 5, 3), torch.ones(2, 5, 3), -torch.ones(3), torch.ones(2, 5, 1))
    torch.export.save(torch.export.export(Scan(), inputs), sys.argv[1] + '/program.pt2')
    warnings.simplefilter('ignore')
    torch.jit.trace(Scan(), inputs).save(sys.argv[1] + '/trace.pt')
"""
INPUTS = (torch.ones(2, 5, 3), torch.ones(2, 5, 3), -torch.ones(3), torch.ones(2, 5, 1))


@pytest.fixture(scope='module')
def programs(tmp_path_factory):
    """Folder of a program and a trace of a process in which `selective_scan` was what is `scan_states` now."""
    folder = tmp_path_factory.mktemp('old')
    subprocess.run([sys.executable, '-c', textwrap.dedent(OLD_VERSION), str(folder)], check=True)
    return folder


ADVICE = r'mmspatialmamba::selective_scan: this program was exported by an older .*::scan_states now\. Export .* again'


def test_an_exported_program_raises(programs):
    program = torch.export.load(programs / 'program.pt2').module()
    with pytest.raises(RuntimeError, match=ADVICE):
        program(*INPUTS)


def test_a_trace_raises(programs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trace = torch.jit.load(programs / 'trace.pt')
    with pytest.raises(RuntimeError, match=ADVICE):
        trace(*INPUTS)


@pytest.mark.parametrize('schema', RETIRED)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('grad', [False, True])
def test_a_retired_op_raises_everywhere_and_names_one_that_is_there(schema, device, grad):
    name = schema.partition('(')[0]
    arguments = [torch.ones(1, 2, 3, device=device, requires_grad=grad)] * schema.partition(')')[0].count('Tensor ')
    with pytest.raises(RuntimeError, match=f'mmspatialmamba::{name}: .*::{RETIRED[schema]} now'):
        getattr(torch.ops.mmspatialmamba, name)(*arguments)
    assert hasattr(torch.ops.mmspatialmamba, RETIRED[schema])
