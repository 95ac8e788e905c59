"""What a picture file says about its picture beside the pixels: EXIF, XMP and texts.

Kept is what stays true of the upscaled picture: camera, time, place, author, rights and whatever a
program wrote as text, such as a workflow. Sizes, resolution and thumbnails are dropped, and the
orientation becomes upright, as the pixels are.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_KEPT = {
    0x010E,  # ImageDescription
    0x010F,  # Make
    0x0110,  # Model
    0x0131,  # Software
    0x0132,  # DateTime
    0x013B,  # Artist
    0x8298,  # Copyright
    _EXIF_IFD,
    _GPS_IFD,
}
_NOT_IN_EXIF_IFD = {
    0x927C,  # MakerNote: points into the old file
    0xA002,  # PixelXDimension
    0xA003,  # PixelYDimension
    0xA005,  # Interoperability
}
_XMP_PNG_KEY = "XML:com.adobe.xmp"
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation(?:="|>))[2-8]')
_MAX_TEXT_BYTES = 16 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metadata:
    """What is written with a result."""

    exif: bytes | None = None
    """As in a JPEG file, with its prefix `Exif\\0\\0`."""
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
    """Texts of a PNG file by keyword."""


def read_metadata(image: Image.Image) -> Metadata:
    """What is worth keeping; nothing where it is damaged, which is no fault of the pixels."""
    try:
        return Metadata(_exif(image), _xmp(image), _text(image))
    except Exception as error:  # Pillow raises nearly everything for damaged metadata
        logger.warning("%s: its metadata is damaged and left out: %s", image.format, error)
        return Metadata()


def save_options(kind: str, metadata: Metadata) -> dict[str, Any]:
    """Options for `Image.save` in the format `kind` of Pillow."""
    options: dict[str, Any] = {}
    if metadata.exif:
        options["exif"] = metadata.exif
    if kind == "PNG":
        options["pnginfo"] = png_texts(metadata)
    elif metadata.xmp:
        options["xmp"] = metadata.xmp
    return options


def png_texts(metadata: Metadata) -> PngInfo:
    """The texts and XMP as chunks of a PNG file."""
    info = PngInfo()
    for key, value in metadata.text.items():
        info.add_text(key, value)
    if metadata.xmp:
        info.add_itxt(_XMP_PNG_KEY, metadata.xmp.decode("utf-8", errors="replace"))
    return info


def _exif(image: Image.Image) -> bytes | None:
    exif = image.getexif()
    for tag in set(exif) - _KEPT:
        del exif[tag]
    camera = exif.get_ifd(_EXIF_IFD)
    for tag in _NOT_IN_EXIF_IFD & set(camera):
        del camera[tag]
    if not any((len(exif), camera, exif.get_ifd(_GPS_IFD))):
        return None
    return exif.tobytes()


def _xmp(image: Image.Image) -> bytes | None:
    xmp = image.info.get("xmp") or image.info.get(_XMP_PNG_KEY)
    if isinstance(xmp, str):
        xmp = xmp.encode()
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) else None


def _text(image: Image.Image) -> dict[str, str]:
    texts = getattr(image, "text", {}) if image.format == "PNG" else {}
    kept = {key: str(value) for key, value in texts.items() if key != _XMP_PNG_KEY}
    return kept if sum(map(len, kept.values())) <= _MAX_TEXT_BYTES else {}
