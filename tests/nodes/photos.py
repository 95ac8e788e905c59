"""Pictures for the node Inf-DiT Upscale Folder."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {"a.png": (12, 10), "b.jpg": (9, 14), "c.webp": (16, 16)}


def put(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def folder_graph(folder: str, format: str, **inputs: Any) -> dict[str, Any]:
    """A workflow of a server: the bundled model and the node, for a folder of `input`."""
    return {
        "load": {
            "class_type": "InfDiTCheckpointLoader",
            "inputs": {"model_name": "infdit_small.safetensors", "weight_dtype": "default"},
        },
        "folder": {
            "class_type": "InfDiTUpscaleFolder",
            "inputs": {
                "model": ["load", 0], "folder": folder, "upscale_by": 4.0, "seed": 0,
                "preset": "draft", "denoise": 1.0, "output_folder": "", "format": format,
                "bit_depth": "8", "overwrite": False, **inputs,
            },
        },
    }  # fmt: skip
