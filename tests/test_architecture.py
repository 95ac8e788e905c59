"""Who may import whom: the rooms of the house, and a wheel that has them all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "infdit_core.errors": set(),
    "infdit_core.edm": set(),
    "infdit_core.whole_files": set(),
    "infdit_core.bands": set(),
    "infdit_core.precision": set(),
    "infdit_core.resume": {"whole_files"},
    "infdit_core.scratch": {"resume", "errors"},
    "infdit_core.blocks": {"errors"},
    "infdit_core.network": {"blocks", "bands", "precision", "edm", "errors"},
    "infdit_core.sampling": {"blocks", "bands", "network", "resume", "scratch", "edm", "errors"},
    "infdit_core.memory": {"blocks", "network", "errors"},
    "infdit_core.checkpoints": {"network", "whole_files", "errors"},
    "infdit_core.dimr": {"checkpoints", "memory", "precision", "errors"},
    "infdit_core.pictures": {
        *("network", "memory", "bands", "scratch", "whole_files", "errors"),
    },
    "infdit_core.clip": {"checkpoints", "errors"},
    "infdit_core.distributed": {"upscale", "sampling", "pictures", "network", "blocks", "errors"},
    "infdit_core.upscale": {
        *("sampling", "pictures", "memory", "network", "blocks", "resume", "scratch", "errors"),
    },
}
"""Rooms of the engine beside their own; `cli`, `__init__` and `__main__` may import all."""
FOREIGN = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
"""Modules of ComfyUI."""
SCRIPTS_MAY_IMPORT = {
    "tools": {"tools", "infdit_core"},
    "training": {"training", "infdit_core"},
    "benchmarks": {"benchmarks", "training", "tools", "infdit_core"},
    "tests": {"tests", "benchmarks", "training", "tools", "infdit_core"},
}


def modules(folder: str) -> dict[str, Path]:
    """Files below a folder of the checkout by the name of their module."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Full names of all that a module imports, wherever in it, for type checking too."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """`infdit_core.network` for `infdit_core.network.rope`."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("name", modules("infdit_core"))
def test_the_engine_imports_as_its_rooms_allow(name: str):
    found = imports(name, modules("infdit_core")[name])
    assert not {n for n in found if n.split(".")[0] in FOREIGN}
    ours = {room(n) for n in found if n.startswith("infdit_core.")}
    allowed = MAY_IMPORT.get(room(name))
    if allowed is not None:
        assert ours - {room(name)} <= {f"infdit_core.{other}" for other in allowed}


def test_no_import_goes_in_a_circle():
    files = modules("infdit_core")
    graph = {
        name: {m for n in imports(name, path) for m in (n, n.rpartition(".")[0]) if m in files}
        for name, path in files.items()
        if name != "infdit_core"
    }
    while free := [name for name, others in graph.items() if not others & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("name", modules("nodes"))
def test_a_node_imports_the_engine_and_what_nodes_share(name: str):
    feature = room(name)
    shared = {"nodes.common"} if feature != "nodes" else set()
    for found in imports(name, modules("nodes")[name]):
        if found.startswith("nodes.") and feature not in ("nodes", "nodes.common"):
            assert room(found) in {feature, *shared}
    if name.endswith(".rules"):
        own = {n.split(".")[0] for n in imports(name, modules("nodes")[name])}
        assert own <= {*sys.stdlib_module_names, "torch"}


@pytest.mark.parametrize("folder", SCRIPTS_MAY_IMPORT)
def test_scripts_import_as_they_may(folder: str):
    ours = {*SCRIPTS_MAY_IMPORT, "infdit_core"}  # `nodes` is a module of ComfyUI there
    for name, path in modules(folder).items():
        found = imports(name, path)
        assert {n.split(".")[0] for n in found} & ours <= SCRIPTS_MAY_IMPORT[folder], name
        assert not {n for n in found if ".conftest" in n}, name


def test_a_wheel_has_every_module(tmp_path: Path):
    """Built from a copy, since setuptools writes beside its source; imported from elsewhere."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ["pyproject.toml", "requirements.txt", "README.md", "LICENSE"]:
        source.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in modules("infdit_core").values():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = sorted(modules("infdit_core"))
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import importlib\n"
    code += f"for name in {names}: importlib.import_module(name)\n"
    code += "import infdit_core; print(infdit_core.__file__)"
    target.mkdir()
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=target, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert str(wheel) in result.stdout
