"""PNG with 16 bits per channel, which Pillow reads and writes for grey pictures only.

Covers what is met in practice: every colour type that has 16 bits, without interlacing.
Reference: PNG specification, third edition (W3C).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type
_COLOUR_TYPES = {channels: colour for colour, channels in _CHANNELS.items()}
_UP = 2  # filter: difference to the row above
_MAX_PIXELS = 2**31
_MAX_SIDE = 2**16
"""In pixels: the time it takes to undo the filters grows with the longer side."""


def read(file: BinaryIO) -> np.ndarray | None:
    """Decode a picture.

    Returns:
        (H, W, C) uint16 with C = 1 (grey), 2 (grey, alpha), 3 or 4; None where the file is no PNG,
        has other than 16 bits, is interlaced or marks one colour as transparent.

    Raises:
        ValueError: the file is damaged.
    """
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        return None
    kind, header = _read_chunk(file)
    if kind != b"IHDR" or len(header) != 13:
        raise ValueError("expected a PNG header, got none")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth != 16 or interlaced or colour not in _CHANNELS:
        return None
    if not 0 < width * height <= _MAX_PIXELS:
        raise ValueError(f"expected 1 to {_MAX_PIXELS} pixels, got {width}×{height}")
    if max(width, height) > _MAX_SIDE:
        raise ValueError(f"expected sides of at most {_MAX_SIDE} pixels, got {width}×{height}")
    compressed = bytearray()
    while kind != b"IEND":
        kind, data = _read_chunk(file)
        if kind == b"tRNS":
            return None
        if kind == b"IDAT":
            compressed += data
    step = 2 * _CHANNELS[colour]
    size = height * (1 + width * step)
    try:
        data = zlib.decompressobj().decompress(compressed, size)
    except zlib.error as error:
        raise ValueError(f"its pixels cannot be decompressed: {error}") from error
    if len(data) < size:
        raise ValueError(f"expected {size} bytes of pixels, got {len(data)}")
    lines = np.frombuffer(data, np.uint8).reshape(height, -1)
    pixels = _unfilter(lines[:, 0], lines[:, 1:].reshape(height, width, step))
    return pixels.view(">u2").astype(np.uint16)


def write(
    file: BinaryIO,
    pixels: np.ndarray,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    texts: Iterable[tuple[bytes, bytes, bool]] = (),
) -> None:
    """Encode (H, W, C) uint16 pixels, C = 1 to 4 as in `read`.

    Args:
        exif: as in a JPEG file, with its prefix.
        texts: kind and data of further chunks, as Pillow's `PngInfo.chunks` has them.
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    lines = np.full((height, 1 + rows.shape[1]), _UP, np.uint8)
    lines[0, 1:] = rows[0]
    lines[1:, 1:] = rows[1:] - rows[:-1]
    file.write(_SIGNATURE + _chunk(b"IHDR", header))
    if icc_profile:
        file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    for kind, data, *_ in texts:
        file.write(_chunk(kind, data))
    file.write(_chunk(b"IDAT", zlib.compress(lines.data)) + _chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _read_chunk(file: BinaryIO) -> tuple[bytes, bytes]:
    start = file.read(8)
    length = int.from_bytes(start[:4], "big")
    data, checksum = file.read(length), file.read(4)
    if len(start) < 8 or len(data) < length or len(checksum) < 4:
        raise ValueError("the file is cut off")
    if zlib.crc32(start[4:] + data) != int.from_bytes(checksum, "big"):
        raise ValueError(f"its part {start[4:]!r} is damaged: the checksum differs")
    return start[4:], data


def _unfilter(filters: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Undo the row filters (H) of bytes (H, W, bytes per pixel).

    A byte depends on its neighbours to the left, above and left above, so an anti-diagonal of
    pixels is done at once. Kept skewed: cell [d, row] is the pixel at column d - row.
    """
    height, width, step = filtered.shape
    if filters.max() > 4:
        raise ValueError(f"expected row filters 0 to 4, got {filters.max()}")
    result = np.zeros((height + 1, width + 1, step), np.uint8)  # zeros above and to the left
    rows = np.arange(height)
    for diagonal in range(height + width - 1):
        row = rows[max(0, diagonal - width + 1) : diagonal + 1]
        column = diagonal - row
        left = result[row + 1, column].astype(np.int16)
        above = result[row, column + 1].astype(np.int16)
        corner = result[row, column].astype(np.int16)
        to_left, to_above = np.abs(above - corner), np.abs(left - corner)
        to_corner = np.abs(left + above - 2 * corner)
        nearest = np.where(
            (to_left <= to_above) & (to_left <= to_corner),
            left,
            np.where(to_above <= to_corner, above, corner),
        )
        predicted = np.choose(
            filters[row, None], [np.int16(0), left, above, (left + above) // 2, nearest]
        )
        result[row + 1, column + 1] = filtered[row, column] + predicted.astype(np.uint8)
    return np.ascontiguousarray(result[1:, 1:])
