"""Models and calls that the tests of the nodes share."""

import importlib
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from tests.goldens import GOLDEN, TINY, random_tensors

STEPS = 4


@pytest.fixture(scope="module")
def load(comfy):
    """Load a model by the loader node: "tiny" without CLIP, "vector" and "clip" with its input."""
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(TINY), folder / "tiny.safetensors")
    with_vector = random_tensors(replace(TINY, vector_size=16))
    save_file(with_vector, folder / "vector.safetensors")
    tower = load_file(GOLDEN / "e_clip" / "tiny_clip.safetensors")
    save_file(with_vector | tower, folder / "clip.safetensors")
    shutil.copy(GOLDEN / "e_clip" / "tiny_clip.safetensors", folder / "tower.safetensors")

    def loader(name, dtype="default"):
        return comfy.nodes["InfDiTCheckpointLoader"].execute(f"{name}.safetensors", dtype).args

    return loader


@pytest.fixture(scope="module")
def upscale(comfy):
    def run(model, image, upscale_by=2.0, seed=0, steps=STEPS, **inputs):
        node = comfy.nodes["InfDiTSampler"]
        return node.execute(model, image, upscale_by, seed, steps, **inputs).args[0]

    return run


@pytest.fixture
def bar(comfy, monkeypatch):
    """Everything that the progress bar was told: (value, total, preview)."""
    utils, told = importlib.import_module("comfy.utils"), []
    monkeypatch.setattr(
        utils, "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: told.append((value, total, preview)),
    )  # fmt: skip
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0)
    return told
