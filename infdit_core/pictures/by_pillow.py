"""Formats by Pillow: JPEG, WebP, BMP, GIF, AVIF, HEIC, and kinds of TIFF that `tiff` leaves to it.

HEIC takes the package pillow-heif, which need not be there. Pillow gives 8 bits; what AVIF and HEIC
have beyond them comes from the decoders behind it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decoded import Colour, Decoded, blank, require_pixels

FORMATS = ["JPEG", "WEBP", "TIFF", "BMP", "GIF", "PNG"]
"""Whatever a file's name says. Not Pillow's others, of which EPS starts another program."""
SUFFIXES = {".bmp", ".gif"}
if find_spec("PIL._avif"):
    FORMATS.append("AVIF")
    SUFFIXES.add(".avif")
_HEIC = find_spec("pillow_heif") is not None
if _HEIC:
    FORMATS.append("HEIF")
    SUFFIXES |= {".heic", ".heif"}
_XMP_OF_TIFF = 700
_IPTC_RESOURCE = 0x0404
_UNSPECIFIED = 2


def read(path: Path, *, head_only: bool = False) -> Decoded:
    """Decode the first picture of a file.

    Args:
        head_only: leave the pixels out, see `blank`.

    Raises:
        ValueError: the file is of no format that is read here, or of a kind that cannot be.
        OSError and others of Pillow: it is damaged.
        PlanError: it does not fit the memory.
    """
    with _open(path) as image:
        if head_only:
            pixels = blank(image.height, image.width, 3 + image.has_transparency_data)
            return Decoded(pixels, exif=image.getexif(), xmp=_xmp(image))
        require_pixels(image.height, image.width, len(image.getbands()))
        image.load()
        pixels, space = _pixels(image, path)
        iptc = image.info.get("photoshop", {})
        return Decoded(
            pixels,
            space,
            Colour(image.info.get("icc_profile"), _cicp(image, path)),
            image.getexif(),
            xmp=_xmp(image),
            iptc=iptc.get(_IPTC_RESOURCE) if isinstance(iptc, dict) else None,
            frames=_frames(image),
        )


def _open(path: Path) -> Image.Image:
    """A file as Pillow opens it; the error tells what the format's own reader says of it."""
    if _HEIC:
        _heif()
    try:
        return Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(_reason(path)) from None


@cache
def _heif() -> Any:
    """The package for HEIC, which Pillow knows of from then on."""
    import pillow_heif  # type: ignore[import-not-found] - an extra

    pillow_heif.register_heif_opener()
    return pillow_heif


def _reason(path: Path) -> str:
    """Why no reader takes a file; Pillow tells only that."""
    data = path.read_bytes()
    for name in FORMATS:
        opener, accept = Image.OPEN.get(name, (None, None))
        if opener and accept and accept(data[:16]) is True:
            try:
                opener(BytesIO(data), str(path))
            except Exception as error:  # Pillow's readers raise nearly everything
                return f"as {name}, {error}"
    return f"expected a picture as {', '.join(FORMATS)}"


def _pixels(image: Image.Image, path: Path) -> tuple[np.ndarray, str]:
    """(H, W, C) and their colours, as in `Decoded`."""
    if image.format in ("AVIF", "HEIF") and (deep := _deep(image.format, path)) is not None:
        return deep, "RGB"
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are {image.mode}; expected 8 bits per channel")
    space = "CMYK" if image.mode == "CMYK" else "RGB"
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    pixels = np.array(image)
    return (pixels[..., None], "GRAY") if pixels.ndim == 2 else (pixels, space)


def _deep(kind: str, path: Path) -> np.ndarray | None:
    """(H, W, 3 or 4) uint16 of a picture with more than 8 bits per channel."""
    if kind == "HEIF":
        image = _heif().open_heif(path, convert_hdr_to_8bit=False)
        return np.asarray(image) if image.mode.endswith(";16") else None
    import imagecodecs

    data = path.read_bytes()
    place = data.find(b"av1C")
    if place < 0 or not data[place + 6] & 0x40:  # high_bitdepth
        return None
    full = 4095 if data[place + 6] & 0x20 else 1023  # twelve_bit
    pixels = imagecodecs.avif_decode(data, index=0).astype(np.uint32)
    pixels = ((pixels * 65535 + full // 2) // full).astype(np.uint16)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


def _cicp(image: Image.Image, path: Path) -> bytes | None:
    """Code points of AVIF and HEIC; what is decoded is RGB of full range."""
    if image.format not in ("AVIF", "HEIF"):
        return None
    data = path.read_bytes()
    place = data.find(b"colrnclx")
    if place < 0:
        return None
    primaries, transfer = data[place + 9], data[place + 11]
    if _UNSPECIFIED in (primaries, transfer):
        return None
    return bytes((primaries, transfer, 0, 1))


def _xmp(image: Image.Image) -> bytes | None:
    found = image.info.get("xmp")
    if found is None and image.format == "TIFF":
        found = image.tag_v2.get(_XMP_OF_TIFF)  # type: ignore[attr-defined] - of a TIFF file
    return found.encode() if isinstance(found, str) else found or None


def _frames(image: Image.Image) -> int:
    if image.format == "MPO":  # the others are the same picture in another form
        return 1
    with suppress(Exception):  # a damaged second frame is no fault of the first
        return 2 if getattr(image, "is_animated", False) else 1
    return 1
