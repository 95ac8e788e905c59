"""ComfyUI 0.3.64, as far as it can be imitated: the pack loads there, and upscales.

What that version lacks is taken away from the real ComfyUI that the tests run in.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfy import Comfy, load_pack
from tests.goldens import TINY, random_tensors
from tests.nodes.schemas import FILE, freeze, read_golden

pytestmark = pytest.mark.comfy

PACKAGE = "comfyui_infdit_old"
MISSING_KEYWORDS = {"search_aliases", "advanced"}
MISSING_NAMES = {
    "comfy_api.latest._io": ("ControlAfterGenerate", "DynamicCombo"),
    "comfy_api.latest._io_public": ("ControlAfterGenerate", "DynamicCombo"),
    "comfy.model_patcher": ("CoreModelPatcher",),
}


@pytest.fixture(scope="module")
def old_nodes(comfy: Comfy) -> Iterator[dict[str, Any]]:
    """Node classes by id, of this pack loaded anew in a ComfyUI without the newer names."""
    io = importlib.import_module("comfy_api.latest").io
    with pytest.MonkeyPatch.context() as patch:
        for module, names in MISSING_NAMES.items():
            for name in names:
                patch.delattr(importlib.import_module(module), name)
        inputs = {
            kind.Input for kind in vars(io).values() if inspect.isclass(getattr(kind, "Input", 0))
        }
        for cls in {io.Schema, io.Input, *inputs}:
            if "__init__" in vars(cls):
                refuse_missing_keywords(patch, cls)
        yield load_pack(PACKAGE)[1]
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def refuse_missing_keywords(patch: pytest.MonkeyPatch, cls: type) -> None:
    """Take the missing keywords from a class's signature, and refuse them."""
    made = cls.__init__
    signature = inspect.signature(made)
    kept = [p for p in signature.parameters.values() if p.name not in MISSING_KEYWORDS]

    def init(self, *args, **kwargs):
        if found := MISSING_KEYWORDS & kwargs.keys():
            raise TypeError(f"{cls.__qualname__}() got unexpected keyword arguments {found}")
        made(self, *args, **kwargs)

    init.__signature__ = signature.replace(parameters=kept)
    patch.setattr(cls, "__init__", init)


def test_the_imitation_refuses_what_that_version_lacks(old_nodes):
    io = importlib.import_module("comfy_api.latest").io
    for make in (
        lambda: io.Schema(node_id="x", search_aliases=[]),
        lambda: io.Int.Input("x", advanced=True),
        lambda: io.Custom("X").Input("x", advanced=True),
    ):
        with pytest.raises(TypeError, match="unexpected"):
            make()


def test_every_schema_is_built_and_takes_the_saved_workflows(old_nodes, monkeypatch):
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda _: [FILE])
    assert {node_id: freeze(node) for node_id, node in old_nodes.items()} == read_golden()


def test_a_misspelt_field_is_still_an_error(old_nodes):
    compat = importlib.import_module(f"{PACKAGE}.nodes.schema_compat")
    with pytest.raises(TypeError, match="descripton"):
        compat.schema(node_id="x", descripton="y")


def test_a_picture_is_upscaled(comfy, old_nodes):
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(TINY), folder / "tiny.safetensors")
    model, _ = old_nodes["InfDiTCheckpointLoader"].execute("tiny.safetensors", "default").args
    picture = old_nodes["InfDiTSampler"].execute(model, torch.rand(1, 9, 12, 3), 2.0, 0, 2).args[0]
    assert picture.shape == (1, 18, 24, 3)
    assert picture.isfinite().all()
