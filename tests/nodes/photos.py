"""Pictures for the node Inf-DiT Upscale Folder."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"a.png": (12, 10), "b.jpg": (9, 14), "c.webp": (16, 16)}


def put(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
