"""Two processes on the CPU against one: DDP, FSDP, MMEngine's FlexibleRunner. `distributed_cases.py` computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

CASES = Path(__file__).with_name('distributed_cases.py')

# Largest differences to one process, each relative to its tensor's largest value, in float64. Measured: DDP 2.6e-15,
# FSDP 9.9e-16, FlexibleRunner 0.0. The tolerance is ten times that.
TOLERANCE = 2.6e-14


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    target = tmp_path_factory.mktemp('distributed') / 'results.json'
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', CASES, target], capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(target.read_text())


@pytest.mark.parametrize('case', ['ddp', 'ddp_frozen', 'ddp_some_outputs', 'ddp_with_cp'])
def test_gradients_equal_those_of_the_joined_batch(results, case):
    """Without ``find_unused_parameters``: a second step would fail if a parameter had no gradient."""
    assert results[case] < TOLERANCE


def test_fsdp_with_blocks_as_units(results):
    assert results['fsdp']['units'] == 6  # five blocks and the rest
    assert results['fsdp']['difference'] < TOLERANCE


def test_flexible_runner_trains_with_fsdp(results):
    assert results['flexible_runner'] < TOLERANCE


def test_sync_batch_norm_needs_a_gpu(results):
    """PyTorch has no such kernel for the CPU, and says so; `test_sizes.py` tests the conversion."""
    assert 'expected input tensor to be on GPU' in results['sync_bn']
