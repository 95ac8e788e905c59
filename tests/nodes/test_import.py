"""What loading the pack costs everybody who starts ComfyUI, whether they use it or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.comfy_server import child_environment

ROOT = Path(__file__).resolve().parents[2]

SECONDS = 0.3
ENGINE_NEEDS = {"einops", "numpy", "psutil", "safetensors"}

NEW_MODULES = """
import json, sys, time
def new_modules(load):
    before, start = set(sys.modules), time.process_time()
    load()
    return sorted(set(sys.modules) - before), time.process_time() - start
"""

LOAD_ENGINE = (
    NEW_MODULES
    + """
import torch
print(json.dumps(new_modules(lambda: __import__("infdit_core"))))
"""
)

# A fresh name loads the pack again: the first time may write Python's caches.
LOAD_PACK = (
    NEW_MODULES
    + """
import importlib
from tests.comfy import load_pack  # before ComfyUI's own folder of that name is found
comfy_source, base = sys.argv[1:]
sys.path.insert(0, comfy_source)
arguments = importlib.import_module("comfy.cli_args").args
arguments.cpu, arguments.base_directory = True, base
import nodes, server, comfy.sample, comfy_api.latest
import comfy_api.torch_helpers.torch_compile  # as one of its own nodes does
print(json.dumps([new_modules(lambda: load_pack(f"pack_{i}")) for i in range(3)]))
"""
)


def run(code: str, *args: str) -> list:
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(
        command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_the_engine_imports_nothing_heavy():
    """No open_clip, torchvision, timm, kornia, matplotlib, tqdm or Pillow before its time."""
    modules, _ = run(LOAD_ENGINE)
    assert packages(modules) - {"infdit_core"} <= ENGINE_NEEDS


def test_a_model_is_loaded_without_the_compiler():
    """Which torch imports, for more than a second, where numbers are drawn on the meta device."""
    path = str(ROOT / "models" / "infdit_small.safetensors")
    load = f"from infdit_core import load_model; load_model({path!r})"
    assert not run(f"import json, sys; {load}; print(json.dumps('torch._dynamo' in sys.modules))")


@pytest.mark.comfy
def test_the_pack_imports_only_itself_and_quickly(comfy_source: Path, tmp_path: Path):
    loads = run(LOAD_PACK, str(comfy_source), str(tmp_path))
    for i, (modules, _) in enumerate(loads):
        assert packages(modules) == {f"pack_{i}"}
    assert min(seconds for _, seconds in loads) < SECONDS, loads
