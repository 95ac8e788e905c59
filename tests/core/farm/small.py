"""Small pictures for the farm, and options that make them fast."""

from pathlib import Path

import numpy as np
from PIL import Image

FAST = ["--steps", "2", "--solver", "euler"]


def put_picture(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    """Write a picture of (height, width) pixels, made of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def put_pictures(folder: Path, count: int) -> None:
    """Write 000.png and so on."""
    for n in range(count):
        put_picture(folder / f"{n:03}.png", n)
