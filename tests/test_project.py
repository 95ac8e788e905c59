"""The project's own rules, as tests: lint, format and types."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        ["pyright", "--pythonpath", sys.executable],
    ],
    ids=["lint", "format", "types"],
)
def test_clean(command: list[str]):
    assert importlib.util.find_spec(command[0]), f"{command[0]} is not installed"
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
