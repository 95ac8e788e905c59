"""A real ComfyUI for the tests: inside this process (`comfy`) and as a server (`comfy_server`).

`tools/dev.py test` sets INFDIT_COMFYUI to its source folder. Without it the tests that need it are
skipped, except under CI, where a skipped test would pass unseen.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy import STEPS, Comfy, load_comfy
from tests.goldens import ASKED, GOLDEN, TINY, TINY_PRIOR, random_tensors
from tools.comfy_server import ComfyServer, running_server

# Kernels are tested where there is no GPU; read when anything imports Triton for the first time.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers in every run, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def comfy(comfy_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    """This pack in a ComfyUI on the CPU, in this process."""
    return load_comfy(comfy_source, tmp_path_factory.mktemp("comfy"))


@pytest.fixture(scope="session")
def load(comfy):
    """Load a model by the loader node.

    "tiny" takes no CLIP embedding, nor does "prior", which has one; "vector" and "clip" do.
    """
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(TINY), folder / "tiny.safetensors")
    save_file(random_tensors(TINY_PRIOR), folder / "prior.safetensors", ASKED)
    with_vector = random_tensors(replace(TINY, vector_size=16))
    save_file(with_vector, folder / "vector.safetensors")
    tower = load_file(GOLDEN / "e_clip" / "tiny_clip.safetensors")
    save_file(with_vector | tower, folder / "clip.safetensors")
    shutil.copy(GOLDEN / "e_clip" / "tiny_clip.safetensors", folder / "tower.safetensors")

    def loader(name, dtype="default"):
        return comfy.nodes["InfDiTCheckpointLoader"].execute(f"{name}.safetensors", dtype).args

    return loader


@pytest.fixture(scope="session")
def upscale(comfy):
    """Run the node Inf-DiT Upscale."""

    def run(model, image, upscale_by=2.0, seed=0, steps=STEPS, **inputs):
        node = comfy.nodes["InfDiTSampler"]
        return node.execute(model, image, upscale_by, seed, steps, **inputs).args[0]

    return run


@pytest.fixture(scope="session")
def comfy_server(
    comfy_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A running ComfyUI on the CPU with this pack and no other, shared by all tests."""
    base = tmp_path_factory.mktemp("server")
    paths = base / "extra_model_paths.yaml"
    paths.write_text(f"elsewhere:\n    base_path: {base / 'elsewhere'}\n    infdit: upscalers\n")
    arguments = ["--cpu", "--extra-model-paths-config", str(paths)]
    with running_server(Path(sys.executable), comfy_source, base, arguments=arguments) as server:
        yield server
