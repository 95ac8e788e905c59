"""TIFF files, by tifffile: of any layout, 1 to 32 bits, and with EXIF.

Pillow keeps 8 bits of colours, and takes 12 bits for 16. Tables of colours, Lab, JPEG and
subsampled colours, which have 8, are left to it.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .decoded import Colour, Decoded, blank, quiet, require_pixels

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIP_BYTES = 2**20
_BIG_BYTES = 2**32 - 2**25
"""Beyond this a file gets offsets of 64 bits: what is compressed may still be as large."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _SEPARATED = 0, 1, 2, 5
_SPACES = {_WHITE_IS_ZERO: "GRAY", _BLACK_IS_ZERO: "GRAY", _RGB: "RGB", _SEPARATED: "CMYK"}
_COLOURS = {"GRAY": 1, "RGB": 3, "CMYK": 4}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_PREMULTIPLIED, _ALPHA = 1, 2
_XMP, _IPTC, _ICC_PROFILE = 700, 33723, 34675
_ASCII, _LONG, _UNDEFINED = 2, 4, 7
_DIRECTORIES = {34665: 34664, 34853: 34852}
"""EXIF and GPS, and the free number that stands for each until tifffile is done: it writes none."""
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
    """Decode the first full picture of a file; None for kinds that are Pillow's.

    Args:
        head_only: leave the pixels out, see `blank`.

    Raises:
        ValueError: it is damaged, cut off, or of a kind that cannot be a picture here.
        PlanError: it does not fit the memory.
    """
    import tifffile

    with quiet("tifffile"), tifffile.TiffFile(path) as file:
        pages: list[Any] = list(islice(file.pages, _MAX_PAGES))
        page = next((page for page in pages if not page.is_reduced), pages[0])
        if page.photometric not in _SPACES or page.compression in _JPEGS:
            return None
        _check_kind(page)
        size = page.imagelength, page.imagewidth, page.samplesperpixel
        if head_only:
            return Decoded(blank(*size), exif=_exif(path, page), xmp=_bytes(page, _XMP))
        require_pixels(*size)
        _check_whole(page, file.filehandle.size)
        pixels = page.asarray(maxworkers=1).reshape(page.shaped)  # (planes, 1, H, W, C)
        pixels = np.moveaxis(pixels[:, 0], 0, -1)[..., 0, :] if len(pixels) > 1 else pixels[0, 0]
        tags = {tag: _bytes(page, tag) for tag in (_ICC_PROFILE, _XMP, _IPTC)}
        exif = _exif(path, page)
    space = _SPACES[page.photometric]
    return Decoded(
        _levels(pixels, page, space),
        space,
        Colour(tags[_ICC_PROFILE]),
        exif,
        xmp=tags[_XMP],
        iptc=tags[_IPTC],
        frames=sum(not page.is_reduced for page in pages) or 1,
    )


def write(
    file: BinaryIO,
    pixels: np.ndarray,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    iptc: bytes | None = None,
) -> None:
    """Encode (H, W, 3 or 4) uint8 or uint16 pixels, deflated; above 4 GB as BigTIFF.

    Args:
        file: to be written and read.
        exif: as in a JPEG file, with its prefix.
    """
    import tifffile

    width, channels = pixels.shape[1:]
    tags = Image.Exif()
    tags.load(exif or b"")
    extra = [_extra(tags, tag) for tag in tags if tag not in _DIRECTORIES]
    extra += [(free, _LONG, 1, 0, True) for tag, free in _DIRECTORIES.items() if tags.get_ifd(tag)]
    extra += [(_XMP, 1, len(xmp), xmp, True)] if xmp else []
    extra += [(_IPTC, _UNDEFINED, len(iptc), iptc, True)] if iptc else []
    big = pixels.nbytes > _BIG_BYTES
    tifffile.imwrite(
        file,
        pixels,
        bigtiff=big,
        byteorder="<",
        photometric="rgb",
        compression="zlib",
        predictor=True,
        rowsperstrip=max(1, _STRIP_BYTES // (width * channels * pixels.itemsize)),
        extrasamples=["unassalpha"] if channels == 4 else None,
        iccprofile=icc_profile,
        extratags=extra,
        metadata=None,
        software=False,
    )
    for tag, free in _DIRECTORIES.items():
        if directory := tags.get_ifd(tag):
            _append(file, tag, free, directory, big)


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
    places = zip(page.dataoffsets, page.databytecounts, strict=True)
    if any(start + count > size or not count for start, count in places):
        raise ValueError("its pixels are cut off")


def _levels(pixels: np.ndarray, page: Any, space: str) -> np.ndarray:
    """(H, W, C) as `Decoded` has them: black is 0, full range, alpha not multiplied in."""
    colours = _COLOURS[space]
    kinds = page.extrasamples[: pixels.shape[-1] - colours]
    alphas = [n for n, kind in enumerate(kinds) if kind in (_PREMULTIPLIED, _ALPHA)]
    pixels = pixels[..., [*range(colours), *(colours + n for n in alphas[:1])]]
    bits = page.bitspersample
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not -_FLOAT_SLACK <= low <= high <= 1 + _FLOAT_SLACK:  # nor is NaN
            raise ValueError(f"its values lie in {low:.4g}..{high:.4g}; expected 0..1")
        pixels = pixels.astype(np.float32).clip(0, 1)
    elif bits == 32:
        pixels = (pixels / (2.0**32 - 1)).astype(np.float32)
    elif bits not in (8, 16):
        kept = np.uint8 if bits < 8 else np.uint16
        full = np.iinfo(kept).max
        pixels = (pixels.astype(np.uint32) * full + (2**bits - 1) // 2) // (2**bits - 1)
        pixels = pixels.astype(kept)
    if page.photometric == _WHITE_IS_ZERO:
        full = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        pixels[..., 0] = full - pixels[..., 0]
    if alphas and kinds[alphas[0]] == _PREMULTIPLIED:
        pixels = _unmultiplied(pixels)
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False))


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
            if isinstance(tag.value, int | str) and tag.code not in _DIRECTORIES:
                exif[tag.code] = tag.value
        return exif
    with path.open("rb") as file:
        exif.load_from_fp(file, page.offset)
        for tag in _DIRECTORIES:
            exif.get_ifd(tag)  # read while the file is open
    return exif


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
