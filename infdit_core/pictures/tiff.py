"""TIFF files, read by tifffile piece by piece: of any layout, 1 to 32 bits, and with EXIF.

Pillow keeps 8 bits of colours, and takes 12 bits for 16. Tables of colours, Lab, JPEG and
subsampled colours, which have 8, are left to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decoded import Colour, Decoded, Piece, blank, quiet, require_pixels
from .levels import bands

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _SEPARATED = 0, 1, 2, 5
_SPACES = {_WHITE_IS_ZERO: "GRAY", _BLACK_IS_ZERO: "GRAY", _RGB: "RGB", _SEPARATED: "CMYK"}
_COLOURS = {"GRAY": 1, "RGB": 3, "CMYK": 4}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_PREMULTIPLIED, _ALPHA = 1, 2
XMP, IPTC, _ICC_PROFILE = 700, 33723, 34675
EXIF_IFD, GPS_IFD = 34665, 34853
COMPRESSIONS = {
    1: "none", 2: "CCITT", 3: "CCITT G3", 4: "CCITT G4", 5: "LZW", 8: "deflate",
    32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "Zstandard",
}  # fmt: skip
"""That are decoded; each further one would be a further decoder to trust."""
_JPEGS = (6, 7)
_MAX_PAGES = 32
"""Among which the picture is looked for."""
_FLOAT_SLACK = 0.01
"""How far a float may lie beyond black or white."""


def read(path: Path, *, head_only: bool = False) -> Decoded | None:
    """The first full picture of a file, whose pixels come in pieces; None for kinds of Pillow's.

    Args:
        head_only: leave the pixels out.

    Raises:
        ValueError: it is damaged, cut off, or of a kind that cannot be a picture here.
        PlanError: one of its tiles or strips does not fit the memory.
    """
    import tifffile

    with quiet("tifffile"), tifffile.TiffFile(path) as file:
        pages: list[Any] = list(islice(file.pages, _MAX_PAGES))
        index = next((n for n, page in enumerate(pages) if not page.is_reduced), 0)
        page = pages[index]
        if page.photometric not in _SPACES or page.compression in _JPEGS:
            return None
        _check_kind(page)
        if not head_only:
            _check_whole(page, file.filehandle.size)
        tags = {tag: _bytes(page, tag) for tag in (_ICC_PROFILE, XMP, IPTC)}
        space = _SPACES[page.photometric]
        channels, _ = _channels(page, space)
        return Decoded(
            blank(page.imagelength, page.imagewidth, len(channels), _kept_dtype(page)),
            space,
            Colour(tags[_ICC_PROFILE]),
            _exif(path, page),
            xmp=tags[XMP],
            iptc=tags[IPTC],
            frames=sum(not page.is_reduced for page in pages) or 1,
            pieces=None if head_only else partial(_pieces, path, index),
        )


def _pieces(path: Path, index: int) -> Iterator[Piece]:
    """Every tile or strip of a page, or bands of rows of large ones, as `Decoded` has them."""
    import tifffile

    with quiet("tifffile"), tifffile.TiffFile(path) as file:
        page: Any = file.pages[index]
        for row, column, pixels in _rows(page) if page.is_final else _segments(page):
            for band in bands(pixels.shape[0], pixels.shape[1] * pixels.shape[2]):
                levels = _levels(pixels[band], page, _SPACES[page.photometric])
                yield row + band.start, column, levels


def _rows(page: Any) -> Iterator[Piece]:
    """Rows of pixels that lie in the file one after the other, uncompressed."""
    planes, _, height, width, samples = page.shaped
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    line = width * samples * dtype.itemsize
    file = page.parent.filehandle
    for band in bands(height, width * samples * planes):
        shape = band.stop - band.start, width, samples
        parts = []
        for plane in range(planes):
            file.seek(page.dataoffsets[0] + (plane * height + band.start) * line)
            data = file.read(shape[0] * line)
            parts.append(np.frombuffer(data, dtype).reshape(shape))
        yield band.start, 0, _joined(parts)


def _segments(page: Any) -> Iterator[Piece]:
    """Tiles or strips; those of several planes together."""
    planes = page.shaped[0]
    count = math.prod(page.chunked) // planes
    file = page.parent.filehandle
    for n in range(count):
        parts = []
        for index in range(n, count * planes, count):
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
            segment, (_, _, row, column, _), _ = page.decode(data, index)
            parts.append(segment[0, : page.imagelength - row, : page.imagewidth - column])
        yield row, column, _joined(parts)


def _joined(planes: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(planes, axis=-1) if len(planes) > 1 else planes[0]


def _check_kind(page: Any) -> None:
    bits, kind = page.bitspersample, page.sampleformat
    if kind == _SIGNED:
        raise ValueError(f"its {bits} bits per channel have a sign; expected unsigned ones")
    if kind not in (_UNSIGNED, _FLOAT, None) or bits > 32 or (kind == _FLOAT and bits < 16):
        raise ValueError(f"it has {bits} bits per channel of kind {kind}; expected 1 to 32")
    if page.compression not in COMPRESSIONS:
        known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise ValueError(f"its compression is {page.compression!s:.40}; expected {known}")
    if page.imagedepth != 1 or page.samplesperpixel < _COLOURS[_SPACES[page.photometric]]:
        raise ValueError(f"expected a picture; its shape is {page.shape}")


def _check_whole(page: Any, size: int) -> None:
    """Whether every strip or tile lies in the file; some decoders overlook a missing end."""
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    missing = len(places) < math.prod(page.chunked) and not page.is_final
    if missing or any(start + count > size or not count for start, count in places):
        raise ValueError("its pixels are cut off")
    if not page.is_final:
        length, width = page.chunks[:2]
        require_pixels(length, width, page.samplesperpixel)


def _channels(page: Any, space: str) -> tuple[list[int], int | None]:
    """Which channels are taken, colours and at most one alpha, and the kind of that."""
    colours = _COLOURS[space]
    kinds = page.extrasamples[: page.samplesperpixel - colours]
    for n, kind in enumerate(kinds):
        if kind in (_PREMULTIPLIED, _ALPHA):
            return [*range(colours), colours + n], kind
    return [*range(colours)], None


def _kept_dtype(page: Any) -> type[np.generic]:
    """Of the pixels that `_levels` makes."""
    if page.sampleformat == _FLOAT or page.bitspersample == 32:
        return np.float32
    return np.uint8 if page.bitspersample <= 8 else np.uint16


def _levels(pixels: np.ndarray, page: Any, space: str) -> np.ndarray:
    """(h, w, C) as `Decoded` has them: black is 0, full range, alpha not multiplied in."""
    channels, alpha = _channels(page, space)
    pixels = pixels[..., channels]
    bits, kept = page.bitspersample, _kept_dtype(page)
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not -_FLOAT_SLACK <= low <= high <= 1 + _FLOAT_SLACK:  # nor is NaN
            raise ValueError(f"its values lie in {low:.4g}..{high:.4g}; expected 0..1")
        pixels = pixels.astype(np.float32).clip(0, 1)
    elif bits == 32:
        pixels = (pixels / (2.0**32 - 1)).astype(np.float32)
    elif bits not in (8, 16):
        full = np.iinfo(kept).max  # type: ignore[type-var] - no float
        pixels = (pixels.astype(np.uint32) * full + (2**bits - 1) // 2) // (2**bits - 1)
        pixels = pixels.astype(kept)
    if page.photometric == _WHITE_IS_ZERO:
        full = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        pixels[..., 0] = full - pixels[..., 0]
    if alpha == _PREMULTIPLIED:
        pixels = _unmultiplied(pixels)
    return pixels.astype(kept, copy=False)  # in this machine's byte order


def _unmultiplied(pixels: np.ndarray) -> np.ndarray:
    full = 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)
    alpha = pixels[..., -1:].astype(np.float32) / full
    colours = np.where(alpha > 0, pixels[..., :-1] / np.where(alpha > 0, alpha, 1), 0)
    colours = colours.clip(0, full)
    if full > 1:
        colours = colours.round()
    return np.concatenate([colours.astype(pixels.dtype), pixels[..., -1:]], axis=-1)


def _bytes(page: Any, number: int) -> bytes | None:
    tag = page.tags.get(number)
    value = tag.value if tag else None
    if isinstance(value, tuple) and all(isinstance(n, int) and 0 <= n < 256 for n in value):
        value = bytes(value)
    return value if isinstance(value, bytes) else None


def _exif(path: Path, page: Any) -> Image.Exif:
    """The tags of the picture's own directory, with those below it."""
    exif = Image.Exif()
    exif.endian, exif.bigtiff = page.parent.byteorder, page.parent.is_bigtiff
    if exif.bigtiff and exif.endian == ">":  # Pillow does not read its directories
        for tag in page.tags:
            if isinstance(tag.value, int | str) and tag.code not in (EXIF_IFD, GPS_IFD):
                exif[tag.code] = tag.value
        return exif
    with path.open("rb") as file:
        exif.load_from_fp(file, page.offset)
        for tag in (EXIF_IFD, GPS_IFD):
            exif.get_ifd(tag)  # read while the file is open
    return exif
