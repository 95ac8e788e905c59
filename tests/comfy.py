"""This pack as a ComfyUI in this process loads it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.comfy_server import ROOT, make_base

PACKAGE = "comfyui_infdit"
STEPS = 4
"""Of the fixture `upscale`, where a test says nothing else."""


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


def load_comfy(source: Path, base: Path) -> Comfy:
    """ComfyUI's modules importable and on the CPU, its files under `base`, this pack in it."""
    # In front, so that `import nodes` finds ComfyUI's nodes.py and not our folder of that name.
    sys.path.insert(0, str(source))
    make_base(base)
    # ComfyUI leaves sys.argv alone unless its main.py asks; these must be set before the rest.
    arguments = importlib.import_module("comfy.cli_args").args
    arguments.cpu = True
    arguments.base_directory = str(base)
    importlib.import_module("nodes")
    return Comfy(*load_pack(PACKAGE), base / "models")
