"""The benchmark tool says what it cannot measure."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / 'tools' / 'benchmark.py'


def test_a_peer_that_cannot_be_imported_is_named(tmp_path):
    code = (
        'import runpy, sys; sys.modules["torchvision"] = None; '
        f'sys.argv = ["benchmark.py", "backbones", "--models", "convnext_t", "--out", {str(tmp_path)!r}]; '
        f'runpy.run_path({str(TOOL)!r}, run_name="__main__")'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'convnext_t: left out, it cannot be imported' in result.stdout
    assert 'torchvision' in result.stdout
    assert result.stderr.splitlines()[-1] == 'nothing to measure: none of convnext_t can be imported'
