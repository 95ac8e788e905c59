"""Photographs as a pack of tiles for a GPU: python -m training.tiles PHOTOS PACK --megabytes 44

Training reads nothing but the pack: TRAIN.bin holds JPEG tiles of 256 px, mostly detailed ones,
VAL.bin tiles of photographs that no tile of TRAIN comes from, TEST.bin the centres of the held-out
photographs. On the GPU the tiles live as uint8, and crops of them are cut in batches.
"""

from __future__ import annotations

import argparse
import io
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data import detail

TILE_PX = 256
TEST_PX = 512
VAL_TILES = 24
QUALITY = 92
CRISP = 1.5
"""Detail in levels from which a tile is always taken."""
SCALES = (1.0, 1.5, 2.2)
"""What a photograph is reduced by: smaller ones are crisper, and 110 megapixels are not many."""
SOFT_SHARE = 0.15
"""Share of the softer tiles: skies must be learnt too, though not from one half of all crops."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="what photos.py made")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--megabytes", type=float, default=44, help="at most so many of tiles")
    args = parser.parse_args()
    args.pack.mkdir(parents=True, exist_ok=True)
    numpy = np.random.default_rng(0)
    photos = sorted((args.photos / "train").glob("*.npy"))
    numpy.shuffle(photos)
    val, chosen = [], []
    for path in photos:
        photo = Image.fromarray(np.load(path))
        sizes = [(round(photo.width / s), round(photo.height / s)) for s in SCALES]
        sized = [np.array(photo.resize(size, Image.Resampling.LANCZOS)) for size in sizes]
        tiles = [tile for reduced in sized for tile in tiles_of(reduced, numpy)]
        if len(val) < VAL_TILES and len(tiles) > 2:
            tiles.sort(key=detail_of)
            val += [tiles[len(tiles) // 2], tiles[-1]]
        else:
            chosen += [t for t in tiles if detail_of(t) >= CRISP or numpy.random() < SOFT_SHARE]
    numpy.shuffle(chosen)
    write(args.pack / "VAL.bin", [encode(t) for t in val])
    encoded, size = [], 0
    for tile in chosen:
        encoded.append(encode(tile))
        size += len(encoded[-1])
        if size > args.megabytes * 1e6:
            break
    write(args.pack / "TRAIN.bin", encoded)
    tests = sorted((args.photos / "test").glob("*.npy"))
    write(args.pack / "TEST.bin", [encode(centre(np.load(p)), 96) for p in tests])
    print(f"{len(encoded)} of {len(chosen)} tiles, {len(val)} to validate, {len(tests)} held out")


def tiles_of(photo: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Tiles side by side, from a random offset."""
    spare = [side % TILE_PX for side in photo.shape[:2]]
    if min(photo.shape[:2]) < TILE_PX:
        return
    top, left = (int(generator.integers(s + 1)) for s in spare)
    for y in range(top, photo.shape[0] - TILE_PX + 1, TILE_PX):
        for x in range(left, photo.shape[1] - TILE_PX + 1, TILE_PX):
            yield np.ascontiguousarray(photo[y : y + TILE_PX, x : x + TILE_PX])


def detail_of(tile: np.ndarray) -> float:
    return detail(torch.from_numpy(tile)).item()


def centre(photo: np.ndarray) -> np.ndarray:
    top, left = ((side - TEST_PX) // 2 for side in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + TEST_PX, left : left + TEST_PX])


def encode(tile: np.ndarray, quality: int = QUALITY) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(tile)
    picture.save(file, "JPEG", quality=quality, subsampling=0, optimize=True, progressive=True)
    return file.getvalue()


def write(path: Path, pictures: list[bytes]) -> None:
    """Each picture after its length in four bytes."""
    path.write_bytes(b"".join(struct.pack("<I", len(p)) + p for p in pictures))


def read(path: Path, device: torch.device, most: int | None = None) -> Tensor:
    """(N, H, W, 3) uint8 of a file of the pack."""
    data, encoded, at = path.read_bytes(), [], 0
    while at < len(data) and (most is None or len(encoded) < most):
        (size,) = struct.unpack_from("<I", data, at)
        encoded.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda p: np.array(Image.open(io.BytesIO(p))), encoded))
    return torch.from_numpy(np.stack(pictures)).to(device)


def crops(tiles: Tensor, count: int, side_px: int, generator: torch.Generator) -> Tensor:
    """(count, 3, side, side) float32 in [-1, 1], channels last: random places, flips and turns.

    Args:
        tiles: (N, H, W, 3) uint8.
        generator: on the device of the tiles.
    """
    device, (n, height, width, _) = tiles.device, tiles.shape

    def integers(below: int) -> Tensor:
        return torch.randint(below, (count,), device=device, generator=generator)

    along = torch.arange(side_px, device=device)
    ys, xs = (
        integers(side - side_px + 1)[:, None]
        + torch.where(integers(2)[:, None] == 1, along.flip(0), along)
        for side in (height, width)
    )
    found = tiles[integers(n)[:, None, None], ys[:, :, None], xs[:, None, :]]  # (count, y, x, 3)
    half = count // 2
    found = torch.cat([found[:half].transpose(1, 2), found[half:]])
    return found.permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
