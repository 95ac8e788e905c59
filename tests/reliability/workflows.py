"""Small workflows in the API format, and a server with the nodes of `debug_nodes`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.goldens import TINY, random_tensors
from tools.comfy_server import ComfyServer, running_server

DEBUG_NODES = Path(__file__).with_name("debug_nodes")
BLACK_AND_GREY = 0x808080


@contextmanager
def debug_server(source: Path, base: Path) -> Iterator[ComfyServer]:
    """A ComfyUI with this pack and the debug nodes; two tiny models lie in its folder."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    if not (nodes / "infdit_debug").exists():
        (nodes / "infdit_debug").symlink_to(DEBUG_NODES, target_is_directory=True)
    models = base / "models" / "infdit"
    models.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("tiny", "other")):
        if not (models / f"{name}.safetensors").exists():
            save_file(random_tensors(TINY, seed), models / f"{name}.safetensors")
    with running_server(Path(sys.executable), source, base, arguments=["--cpu"]) as server:
        server.check_pack("InfDiTSampler")
        yield server


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(
    seed: int = 0, model: str = "tiny", width: int = 16, height: int = 8, batch: int = 1
) -> dict[str, Any]:
    """Upscale a grey picture four times, in six evaluations, and save it."""
    return {
        "load": node(
            "InfDiTCheckpointLoader", model_name=f"{model}.safetensors", weight_dtype="default"
        ),
        "image": node(
            "EmptyImage", width=width, height=height, batch_size=batch, color=BLACK_AND_GREY
        ),
        "upscale": node(
            "InfDiTSampler",
            model=["load", 0],
            image=["image", 0],
            upscale_by=4.0,
            seed=seed,
            steps=20,
            preset="draft",
        ),
        "save": node("SaveImage", images=["upscale", 0], filename_prefix="result"),
    }


def pixels(path: Path) -> torch.Tensor:
    """(H, W, C) uint8 of a picture file."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path)))
