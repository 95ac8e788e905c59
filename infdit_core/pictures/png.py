"""PNG files: chunks around pixels, which libpng codes (imagecodecs).

Pillow keeps 8 of 16 bits, and gives a picture up for a text that is too long. Here libpng sees no
chunk but those of the pixels. Reference: Portable Network Graphics, third edition (W3C).
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .decoded import Colour, Decoded, blank, quiet, require_pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OF_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""By colour type."""
_PALETTE = 3
_XMP_KEY = "XML:com.adobe.xmp"
_MAX_TEXT_BYTES = 16 * 2**20
"""Of a text, and of a profile, unpacked."""

logger = logging.getLogger(__name__)


def read(path: Path, *, head_only: bool = False) -> Decoded:
    """Decode a picture; of an animation its default image.

    Args:
        head_only: leave the pixels out, see `blank`.

    Raises:
        ValueError: the file is damaged; the pixels are, or are cut off.
        PlanError: they do not fit the memory.
    """
    chunks = list(_chunks(path.read_bytes()))
    kinds = [kind for kind, _ in chunks]
    if kinds[:1] != [b"IHDR"] or len(chunks[0][1]) != 13 or b"IDAT" not in kinds:
        raise ValueError("it is damaged or cut off")
    width, height, bits, colour_type = struct.unpack_from(">IIBB", chunks[0][1])
    channels = _CHANNELS.get(colour_type, 4) + _has_transparency(chunks, colour_type)
    if head_only:
        pixels = blank(height, width, channels)
    else:
        require_pixels(height, width, channels)
        pixels = np.empty((height, width, channels), np.uint16 if bits == 16 else np.uint8)
        _decode(chunks, pixels)
    space = "RGB" if colour_type == _PALETTE or pixels.shape[-1] > 2 else "GRAY"
    decoded = Decoded(pixels, space)
    for kind, data in chunks:
        try:
            _annotate(decoded, kind, bytes(data))
        except Exception as error:
            logger.warning(
                "%s: its %s is damaged and left out: %s", path.name, kind.decode(), error
            )
    if b"sRGB" in kinds:
        decoded.colour.gamma = decoded.colour.chromaticities = None
    return decoded


def _has_transparency(chunks: list[tuple[bytes, memoryview]], colour_type: int) -> bool:
    """Whether there is a transparent colour, or alphas of a palette, which libpng takes."""
    parts = {kind: len(data) for kind, data in chunks}
    longest = {0: 2, 2: 6, _PALETTE: parts.get(b"PLTE", 0) // 3}.get(colour_type, 0)
    found = parts.get(b"tRNS", 0)
    return 0 < found <= longest and (colour_type == _PALETTE or found == longest)


def _decode(chunks: list[tuple[bytes, memoryview]], pixels: np.ndarray) -> None:
    """Into (H, W, C) of 8 or 16 bits, palettes and transparent colours resolved."""
    import imagecodecs

    coded = b"".join(_chunk(kind, data) for kind, data in chunks if kind in _OF_PIXELS)
    grey = pixels.shape[-1] == 1
    try:
        with quiet("imagecodecs"):
            imagecodecs.png_decode(SIGNATURE + coded, out=pixels.squeeze(-1) if grey else pixels)
    except (imagecodecs.PngError, ValueError) as error:
        # imagecodecs never lets go of the pixels of a damaged file; at least they are no memory
        pixels.resize(0, refcheck=False)
        raise ValueError(f"its pixels are damaged or cut off ({error})") from error


def write(
    file: BinaryIO,
    pixels: np.ndarray,
    colour: Colour,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Encode (H, W, C) uint8 or uint16 pixels, C = 1 to 4.

    Args:
        exif: as in a JPEG file, with its prefix.
        texts: by keyword, of which `is_keyword` holds.
    """
    import imagecodecs

    coded = memoryview(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
    head = len(SIGNATURE) + 25  # IHDR, before which nothing may stand
    file.write(coded[:head])
    if colour.cicp:
        file.write(_chunk(b"cICP", colour.cicp))
    if colour.icc_profile:
        file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(colour.icc_profile)))
    if exif:
        file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp:
        file.write(_text_chunk(_XMP_KEY, xmp.decode("utf-8", errors="replace"), plain=True))
    for key, value in (texts or {}).items():
        file.write(_text_chunk(key, value))
    file.write(coded[head:])


def is_keyword(key: str) -> bool:
    """Whether a text can have this name: 1 to 79 printable characters of Latin-1."""
    try:
        return 0 < len(key.encode("latin-1")) < 80 and key.isprintable() and key == key.strip()
    except UnicodeEncodeError:
        return False


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and data of every whole chunk."""
    view, at = memoryview(data), len(SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            return
        yield kind, view[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(kind: bytes, data: bytes | memoryview) -> bytes:
    length, checksum = struct.pack(">I", len(data)), zlib.crc32(data, zlib.crc32(kind))
    return b"".join((length, kind, data, struct.pack(">I", checksum)))


def _annotate(decoded: Decoded, kind: bytes, data: bytes) -> None:
    """What a chunk says, into `decoded`."""
    colour = decoded.colour
    if kind == b"iCCP":
        colour.icc_profile = _unpacked(data.partition(b"\0")[2][1:])
    elif kind == b"cICP" and len(data) == 4:
        colour.cicp = data
    elif kind == b"gAMA":
        colour.gamma = struct.unpack(">I", data)[0] / 100_000
    elif kind == b"cHRM":
        colour.chromaticities = tuple(n / 100_000 for n in struct.unpack(">8I", data))
    elif kind == b"eXIf":
        decoded.exif = Image.Exif()
        decoded.exif.load(b"Exif\0\0" + data)
    elif kind == b"acTL":
        decoded.frames = max(1, struct.unpack_from(">I", data)[0])
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        key, text = _text(kind, data)
        if key == _XMP_KEY:
            decoded.xmp = text.encode()
        else:
            decoded.text = {**decoded.text, key: text}


def _text(kind: bytes, data: bytes) -> tuple[str, str]:
    key, _, value = data.partition(b"\0")
    if kind == b"zTXt":
        value = _unpacked(value[1:])
    if kind != b"iTXt":
        return key.decode("latin-1"), value.decode("latin-1")
    packed, _, rest = value[0], value[1], value[2:]
    value = rest.split(b"\0", 2)[2]  # language and translated keyword stand before it
    return key.decode("latin-1"), (_unpacked(value) if packed else value).decode()


def _text_chunk(key: str, value: str, *, plain: bool = False) -> bytes:
    """A text; compressed where it is long, unless `plain`."""
    name = key.encode("latin-1")
    try:
        coded = value.encode("latin-1")
    except UnicodeEncodeError:
        plain, coded = True, None
    if plain or coded is None:
        return _chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode())
    return _chunk(b"tEXt", name + b"\0" + coded)


def _unpacked(data: bytes) -> bytes:
    unpack = zlib.decompressobj()
    found = unpack.decompress(data, _MAX_TEXT_BYTES)
    if not unpack.eof:
        raise ValueError(f"expected at most {_MAX_TEXT_BYTES} bytes, whole")
    return found
