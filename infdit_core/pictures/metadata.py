"""What a picture file says about its picture beside the pixels: EXIF, XMP, IPTC and texts.

Kept is what stays true of the upscaled picture: camera, time, place, author, rights and whatever a
program wrote as text, such as a workflow. Sizes, resolution and thumbnails are dropped, and the
orientation becomes upright, as the pixels are.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from . import png, xmp
from .decoded import Decoded

_ORIENTATION = 0x0112
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
    0x9214,  # SubjectArea, in pixels
    0x927C,  # MakerNote: points into the old file
    0xA002,  # PixelXDimension
    0xA003,  # PixelYDimension
    0xA005,  # Interoperability
    0xA20E,  # FocalPlaneXResolution, in pixels
    0xA20F,  # FocalPlaneYResolution
    0xA210,  # FocalPlaneResolutionUnit
    0xA214,  # SubjectLocation, in pixels
}
_EXIF_HEAD, _XMP_HEAD = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_RAW = "Raw profile type "
"""What the keywords of ImageMagick's texts begin with; the kind of data follows."""
_HEX = re.compile(r"\s*\S+\s+(\d+)\s+([0-9A-Fa-f\s]*)")
_RESOURCE = b"8BIM"
_IPTC_RESOURCE = 0x0404
_MAX_TEXT_BYTES = 16 * 2**20
_JPEG_SEGMENT = 65533
"""Bytes after the length of a segment."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metadata:
    """What is written with a result."""

    exif: bytes | None = None
    """As in a JPEG file, with its prefix `Exif\\0\\0`."""
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
    """Texts of a PNG file by keyword."""
    iptc: bytes | None = None
    """Datasets of IPTC-IIM."""


def unwrap_raw_profiles(decoded: Decoded) -> None:
    """Give what ImageMagick's texts hold its own place, unless there is something in it."""
    text = dict(decoded.text)
    for key in [key for key in text if key.startswith(_RAW)]:
        kind, value = key.removeprefix(_RAW).lower(), text.pop(key)
        found = _HEX.fullmatch(value)
        data = bytes.fromhex(found[2]) if found else b""
        if not found or len(data) != int(found[1]):
            logger.warning("the text %r is damaged and left out", key)
        elif kind in ("exif", "app1") and data.startswith(_EXIF_HEAD):
            if not len(decoded.exif):
                decoded.exif.load(data)
        elif kind in ("xmp", "app1"):
            decoded.xmp = decoded.xmp or data.removeprefix(_XMP_HEAD)
        elif kind in ("iptc", "8bim", "app13"):
            decoded.iptc = decoded.iptc or iptc_of(data)
        elif kind in ("icc", "icm"):
            decoded.colour.icc_profile = decoded.colour.icc_profile or data
    decoded.text = text


def orientation(decoded: Decoded) -> int:
    """1 to 8, as EXIF says, else XMP."""
    found = decoded.exif.get(_ORIENTATION)
    if found is None and decoded.xmp:
        with suppress(ValueError):  # whatever is wrong with it, `kept` tells
            return xmp.orientation(decoded.xmp)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def kept(decoded: Decoded, name: str) -> Metadata:
    """What is worth keeping; damaged parts are left out, which is no fault of the pixels."""

    def part(kind: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # Pillow raises nearly everything for damaged metadata
            logger.warning("%s: its %s is damaged and left out: %s", name, kind, error)
            return None

    return Metadata(
        part("EXIF", lambda: _exif(decoded.exif)),
        part("XMP", lambda: xmp.upright(decoded.xmp) if decoded.xmp else None),
        {key: str(value) for key, value in decoded.text.items()},
        decoded.iptc,
    )


def fitting(metadata: Metadata, kind: str) -> tuple[Metadata, list[str]]:
    """What a file in Pillow's format `kind` can hold, and in words what it cannot."""
    left = []
    found = metadata
    if kind == "JPEG":
        if len(metadata.exif or b"") > _JPEG_SEGMENT:
            left.append(f"its EXIF of {len(metadata.exif or b'')} bytes")
            found = replace(found, exif=None)
        room = _JPEG_SEGMENT - len(_XMP_HEAD)
        if len(metadata.xmp or b"") > room:
            short, names = xmp.shortened(metadata.xmp or b"", room)
            left += [f"{name} of its XMP" for name in names] or ["its XMP"]
            found = replace(found, xmp=short)
        if len(jpeg_iptc(metadata.iptc)) > _JPEG_SEGMENT:
            left.append(f"its IPTC of {len(metadata.iptc or b'')} bytes")
            found = replace(found, iptc=None)
    if kind == "PNG":
        bad = [key for key in metadata.text if not png.is_keyword(key)]
        left += [f"the text {key!r}, whose name PNG cannot hold" for key in bad]
        texts = {key: text for key, text in metadata.text.items() if key not in bad}
        found = replace(found, text=texts)
    elif metadata.text:
        names = ", ".join(map(repr, list(metadata.text)[:4]))
        left.append(f"texts ({names}), which only .png holds")
        found = replace(found, text={})
    if kind == "WEBP" and metadata.iptc:
        left.append("IPTC, which WebP does not hold")
        found = replace(found, iptc=None)
    return found, left


def iptc_of(data: bytes) -> bytes | None:
    """The IPTC datasets in resources of Photoshop, or bare ones as they are."""
    at = data.find(_RESOURCE)
    if at < 0:
        return data or None
    while data[at : at + 4] == _RESOURCE and at + 12 <= len(data):
        (number,) = struct.unpack_from(">H", data, at + 4)
        name = data[at + 6] + 1
        start = at + 6 + name + name % 2
        (size,) = struct.unpack_from(">I", data, start)
        if number == _IPTC_RESOURCE:
            return data[start + 4 : start + 4 + size] or None
        at = start + 4 + size + size % 2
    return None


def iptc_resource(iptc: bytes) -> bytes:
    """Datasets as a resource of Photoshop."""
    size = struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc))
    return _RESOURCE + size + iptc + bytes(len(iptc) % 2)


def jpeg_iptc(iptc: bytes | None) -> bytes:
    """The body of the APP13 segment for datasets; nothing for none."""
    return b"Photoshop 3.0\0" + iptc_resource(iptc) if iptc else b""


def raw_profile(kind: str, data: bytes) -> tuple[str, str]:
    """Keyword and text as ImageMagick writes data that PNG has no chunk for."""
    lines = [data.hex()[at : at + 72] for at in range(0, 2 * len(data), 72)]
    return _RAW + kind, "\n".join(["", kind, f"{len(data):8}", *lines, ""])


def _exif(exif: Image.Exif) -> bytes | None:
    for tag in set(exif) - _KEPT:
        del exif[tag]
    camera = exif.get_ifd(_EXIF_IFD)
    for tag in _NOT_IN_EXIF_IFD & set(camera):
        del camera[tag]
    if not any((len(exif), camera, exif.get_ifd(_GPS_IFD))):
        return None
    return exif.tobytes()
