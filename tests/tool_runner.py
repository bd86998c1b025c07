"""Runs tools in this process."""

import contextlib
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
REQUIRE_BROWSER = 'MMSPATIALMAMBA_REQUIRE_BROWSER'
"""Environment variable that turns a missing browser from a skip into a failure; CI sets it to 1."""


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


@contextlib.contextmanager
def browser_page(path: Path):
    """Opens a page of a tool in Chromium; skips where there is none, unless the environment asks for it.

    Yields:
        Playwright's page, what the browser complained about, and the addresses that it asked for.
    """
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    missing = [name for name, found in (('Playwright', sync_playwright), ('Chromium', executable)) if not found]
    if missing:
        hint = 'pip install playwright, apt-get install chromium'
        reason = f'NOT LOOKED AT IN A BROWSER: {" and ".join(missing)} not found ({hint})'
        pytest.fail(reason) if os.environ.get(REQUIRE_BROWSER) == '1' else pytest.skip(reason)

    asked, complaints = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1200, 'height': 900})
        page.on('request', lambda request: asked.append(request.url))
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        yield page, complaints, asked
        browser.close()
