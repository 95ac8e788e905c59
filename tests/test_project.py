"""The project's own rules, as tests: lint, format, types and the size of the recordings."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.goldens import GOLDEN

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


def test_the_recordings_stay_small():
    sizes = {p.relative_to(GOLDEN): p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) <= 20_000_000, f"thin out tests/golden; its largest: {largest}"
