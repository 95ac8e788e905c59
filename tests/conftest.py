"""A real ComfyUI for the tests: inside this process (`comfy`) and as a server (`comfy_server`).

`tools/dev.py test` sets INFDIT_COMFYUI to its source folder. Without it the tests that need it are
skipped, except under CI, where a skipped test would pass unseen.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tools.comfy_server import ComfyServer, make_base, running_server

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_infdit"
THREADS = min(2, os.cpu_count() or 1)

torch.set_num_threads(THREADS)


@dataclass(frozen=True)
class Comfy:
    """This pack as loaded by a ComfyUI in this process.

    Its `infdit_core` is `comfyui_infdit.infdit_core`: classes of the top-level `infdit_core` that
    a test imports are other objects, so take what nodes return from `module`.
    """

    pack: ModuleType
    nodes: dict[str, Any]
    """Node classes by id."""
    models_dir: Path
    """ComfyUI's models folder, empty at first."""

    def module(self, name: str) -> ModuleType:
        """A module of the pack, such as "nodes.infdit.loader" or "infdit_core.edm"."""
        return importlib.import_module(f"{PACKAGE}.{name}")


@pytest.fixture(scope="session")
def comfy_source() -> Path:
    """Source folder of the real ComfyUI."""
    folder = os.environ.get("INFDIT_COMFYUI")
    if folder:
        return Path(folder)
    reason = "INFDIT_COMFYUI is not set; `python3 tools/dev.py test` sets it"
    if os.environ.get("CI") == "true":
        pytest.fail(f"Expected a ComfyUI under CI: {reason}.")
    pytest.skip(reason)


def load_pack(package: str) -> tuple[ModuleType, dict[str, Any]]:
    """This pack under the name `package`, as ComfyUI loads it, and its node classes by id."""
    spec = importlib.util.spec_from_file_location(
        package, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    async def node_list() -> list[Any]:
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return pack, {node.define_schema().node_id: node for node in asyncio.run(node_list())}


@pytest.fixture(scope="session")
def comfy(comfy_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    """ComfyUI's modules importable and on the CPU, this pack loaded as ComfyUI loads it."""
    # In front, so that `import nodes` finds ComfyUI's nodes.py and not our folder of that name.
    sys.path.insert(0, str(comfy_source))
    base = make_base(tmp_path_factory.mktemp("comfy"))
    # ComfyUI leaves sys.argv alone unless its main.py asks; these must be set before the rest.
    arguments = importlib.import_module("comfy.cli_args").args
    arguments.cpu = True
    arguments.base_directory = str(base)
    importlib.import_module("nodes")

    pack, nodes = load_pack(PACKAGE)
    return Comfy(pack, nodes, base / "models")


@pytest.fixture(scope="session")
def comfy_server(
    comfy_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A running ComfyUI on the CPU with this pack and no other, shared by all tests."""
    base = tmp_path_factory.mktemp("server")
    paths = base / "extra_model_paths.yaml"
    paths.write_text(f"elsewhere:\n    base_path: {base / 'elsewhere'}\n    infdit: upscalers\n")
    arguments = ["--cpu", "--extra-model-paths-config", str(paths)]
    with running_server(
        Path(sys.executable), comfy_source, base, arguments=arguments, threads=THREADS
    ) as server:
        yield server
