"""TIFF files, written by tifffile band by band, with EXIF and, on request, as a pyramid.

A pyramid's reduced pictures follow as pages of their own, marked as reduced: OpenSlide, and QuPath
through it, look for them there and not in SubIFDs; what knows no pyramids shows the first page.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .levels import Levels, bands
from .tiff import EXIF_IFD, GPS_IFD, IPTC, XMP

_STRIP_BYTES = 2**20
_TILE = 256
"""Side of a tile in pixels; what viewers of large pictures take."""
_TILED_BYTES = 2**27
"""From here on a picture is tiled, so that a part can be read alone."""
_BIG_BYTES = 2**32 - 2**25
"""Beyond this a file gets offsets of 64 bits: what is compressed may still be as large."""
_ASCII, _LONG, _UNDEFINED = 2, 4, 7
_REDUCED = 1
_DIRECTORIES = {EXIF_IFD: 34664, GPS_IFD: 34852}
"""EXIF and GPS, and the free number that stands for each until tifffile is done: it writes none."""

Rows = Levels | np.ndarray
"""(H, W, C) uint8 or uint16, of which bands of rows are taken."""


def write(
    file: BinaryIO,
    pixels: Rows,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    iptc: bytes | None = None,
    *,
    pyramid: bool = False,
) -> None:
    """Encode (H, W, 3 or 4) pixels, deflated; above 4 GB as BigTIFF.

    Args:
        file: to be written and read; it has a name, beside which a pyramid takes a third of the
            pixels' bytes for a while.
        exif: as in a JPEG file, with its prefix.
        pyramid: add the picture at half its size, a quarter and so on down to a tile.
    """
    import tifffile

    tags = Image.Exif()
    tags.load(exif or b"")
    extra = [_extra(tags, tag) for tag in tags if tag not in _DIRECTORIES]
    extra += [(free, _LONG, 1, 0, True) for tag, free in _DIRECTORIES.items() if tags.get_ifd(tag)]
    extra += [(XMP, 1, len(xmp), xmp, True)] if xmp else []
    extra += [(IPTC, _UNDEFINED, len(iptc), iptc, True)] if iptc else []
    tiled = pyramid or pixels.nbytes >= _TILED_BYTES
    big = pixels.nbytes * (4 / 3 if pyramid else 1) > _BIG_BYTES
    with tifffile.TiffWriter(file, bigtiff=big, byteorder="<") as writer:  # type: ignore[arg-type] - as below
        _write_page(writer, pixels, tiled, iccprofile=icc_profile, extratags=extra)
        while pyramid and max(pixels.shape[:2]) > _TILE:
            pixels = _halved(pixels, os.path.dirname(file.name))
            _write_page(writer, pixels, tiled, iccprofile=icc_profile, subfiletype=_REDUCED)
    for tag, free in _DIRECTORIES.items():
        if directory := tags.get_ifd(tag):
            _append(file, tag, free, directory, big)


def _write_page(writer: Any, pixels: Rows, tiled: bool, **options: Any) -> None:
    height, width, channels = pixels.shape
    rows = max(1, _STRIP_BYTES // (width * channels * pixels.dtype.itemsize))
    layout = {"tile": (_TILE, _TILE)} if tiled else {"rowsperstrip": rows}
    parts = _tiles(pixels) if tiled else _strips(pixels, min(rows, height))
    writer.write(
        _packed(parts),
        shape=pixels.shape,
        dtype=pixels.dtype,
        photometric="rgb",
        compression="zlib",
        predictor=True,
        extrasamples=["unassalpha"] if channels == 4 else None,
        metadata=None,
        software=False,
        **layout,
        **options,
    )


def _strips(pixels: Rows, rows: int) -> Iterator[np.ndarray]:
    return (pixels[top : top + rows] for top in range(0, pixels.shape[0], rows))


def _tiles(pixels: Rows) -> Iterator[np.ndarray]:
    """From the left to the right, then downwards; those at the edges are filled up."""
    for band in _strips(pixels, _TILE):
        for left in range(0, pixels.shape[1], _TILE):
            tile = band[:, left : left + _TILE]
            missing = [(0, _TILE - side) for side in tile.shape[:2]]
            yield np.pad(tile, [*missing, (0, 0)])


def _packed(parts: Iterator[np.ndarray]) -> Iterator[bytes]:
    """Tiles or strips as they lie in the file, a few ahead, by as many threads as torch has."""
    threads = torch.get_num_threads()
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            waiting.append(pool.submit(_deflated, part))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        yield from (done.result() for done in waiting)


def _deflated(part: np.ndarray) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.deflate_encode(imagecodecs.delta_encode(part, axis=-2).tobytes()))


def _halved(pixels: Rows, folder: str) -> np.ndarray:
    """(H, W, C) -> (H/2, W/2, C), rounded up: means of 2x2 pixels, in a file without a name."""
    height, width, channels = pixels.shape
    with TemporaryFile(dir=folder) as file:
        for band in bands(-(-height // 2), 4 * width * channels):
            _means(pixels[2 * band.start : 2 * band.stop]).tofile(file)
        file.flush()
        shape = -(-height // 2), -(-width // 2), channels
        return np.memmap(file, pixels.dtype, "r", shape=shape)


def _means(pixels: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels, or of what there is of them at the edges; of colours by their alpha."""
    height, width, channels = pixels.shape
    pixels = np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    four = [pixels[y::2, x::2] for y in (0, 1) for x in (0, 1)]
    means = reduce(np.add, [part.astype(np.float32) for part in four]) * np.float32(0.25)  # exact
    if channels == 4:
        weights = [part[..., 3:].astype(np.float64) for part in four]
        seen = reduce(np.add, [part[..., :3] * w for part, w in zip(four, weights, strict=True)])
        total = reduce(np.add, weights)
        colours = np.divide(seen, total, out=means[..., :3].astype(np.float64), where=total > 0)
        means[..., :3] = colours.round()
    return means.round().astype(pixels.dtype)


def _extra(tags: Image.Exif, tag: int) -> tuple:
    value = tags[tag]
    text = value if isinstance(value, str) else str(value)
    return tag, _ASCII, None, text.encode("utf-8", errors="replace"), True


def _append(file: BinaryIO, tag: int, free: int, values: dict, big: bool) -> None:
    """A directory of EXIF at the end of the file, and the way to it."""
    import tifffile
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    head = b"II+\0\x08\0\0\0" + bytes(8) if big else b"II*\0\x08\0\0\0"
    directory = ImageFileDirectory_v2(ifh=head)
    for key, value in values.items():
        directory[key] = value
    at = file.seek(0, 2)
    at += file.write(bytes(at % 2))
    file.write(directory.tobytes(at))
    file.seek(0)
    with tifffile.TiffFile(file) as found:  # type: ignore[arg-type] - it takes what can seek
        entry = found.pages[0].aspage().tags[free]
        entry.overwrite(at)
        place = entry.offset
    file.seek(place)
    file.write(tag.to_bytes(2, "little"))
