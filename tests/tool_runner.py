"""Runs tools in this process."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_tool(name: str) -> types.ModuleType:
    """Imports ``tools/NAME.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_tool(tool: types.ModuleType, *args, monkeypatch) -> int | None:
    """Calls the tool's ``main`` with a command line."""
    monkeypatch.setattr(sys, 'argv', [tool.__name__, *map(str, args)])
    return tool.main()


def refusal(tool: types.ModuleType, *args, monkeypatch, capsys) -> str:
    """Runs a tool that must refuse its input, and returns the one line that it refuses with."""
    with pytest.raises(SystemExit) as stop:
        run_tool(tool, *args, monkeypatch=monkeypatch)
    # argparse prints its line itself, below the usage; what main gives to sys.exit is printed by Python.
    lines = capsys.readouterr().err.splitlines()[-1:] if stop.value.code == 2 else stop.value.code.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
