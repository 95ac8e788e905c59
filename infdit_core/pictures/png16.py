"""PNG with 16 bits per channel, of which Pillow keeps eight where there is colour or alpha."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
_UP = 2  # filter: difference to the row above


def is_png16(path: Path) -> bool:
    """Whether a file is a PNG picture with 16 bits per channel."""
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(_SIGNATURE) and head[24:] == b"\x10"


def read(path: Path, transparent: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Decode a picture.

    Args:
        path: of a file that `is_png16`.
        transparent: the one colour that is transparent in a picture without alpha.

    Returns:
        (H, W, C) uint16 with C = 1 (grey), 2 (grey, alpha), 3 or 4.

    Raises:
        ValueError: the file is damaged.
    """
    from torchvision.io import ImageReadMode, decode_png

    data = torch.from_numpy(np.fromfile(path, np.uint8))
    try:
        pixels = decode_png(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except RuntimeError as error:
        raise ValueError("its pixels are damaged or cut off") from error
    if transparent is not None:
        alpha = np.where((pixels == transparent).all(-1, keepdims=True), 0, 65535)
        pixels = np.concatenate([pixels, alpha.astype(np.uint16)], axis=-1)
    return pixels


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
