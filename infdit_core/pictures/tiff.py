"""TIFF with 8 or 16 bits per channel, deflated, and with EXIF.

Pillow writes 8 bits only, and no EXIF into a compressed file. Its directories of tags do both.
Reference: TIFF 6.0, and Adobe's Photoshop TIFF technical notes for deflate and the predictor.
"""

from __future__ import annotations

import struct
import zlib
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np

from .metadata import Metadata

_STRIP_BYTES = 2**20
_MAX_BYTES = 2**32 - 1
_ADOBE_DEFLATE, _HORIZONTAL, _RGB, _UNASSOCIATED_ALPHA, _CHUNKY = 8, 2, 2, 2, 1
_XMP, _ICC_PROFILE = 700, 34675
_BYTE, _LONG, _UNDEFINED = 1, 4, 7
_SUB_DIRECTORIES = (0x8769, 0x8825)  # EXIF, GPS


def write(
    file: BinaryIO, pixels: np.ndarray, icc_profile: bytes | None, metadata: Metadata
) -> None:
    """Encode (H, W, 3 or 4) uint8 or uint16 pixels.

    Raises:
        ValueError: more than 4 GB, which the format cannot hold.
    """
    height, width, channels = pixels.shape
    rows = max(1, _STRIP_BYTES // (width * channels * pixels.itemsize))
    strips = [_strip(pixels[top : top + rows]) for top in range(0, height, rows)]
    sizes = [len(strip) for strip in strips]
    tags: dict[int, Any] = {
        256: width,
        257: height,
        258: (8 * pixels.itemsize,) * channels,
        259: _ADOBE_DEFLATE,
        262: _RGB,
        273: tuple(accumulate(sizes[:-1], initial=0)),  # Pillow adds where the directory ends
        277: channels,
        278: rows,
        279: tuple(sizes),
        284: _CHUNKY,
        317: _HORIZONTAL,
    }
    if channels == 4:
        tags[338] = _UNASSOCIATED_ALPHA
    if icc_profile:
        tags[_ICC_PROFILE] = icc_profile
    header = struct.pack("<2sHI", b"II", 42, 8)
    directory = _directory(tags, metadata).tobytes(len(header))
    if len(header) + len(directory) + sum(sizes) > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES} bytes in a TIFF file; use .png")
    file.writelines([header, directory, *strips])


def _strip(pixels: np.ndarray) -> bytes:
    differences = pixels.copy()
    differences[:, 1:] -= pixels[:, :-1]
    return zlib.compress(differences.astype(differences.dtype.newbyteorder("<")).tobytes())


def _directory(tags: dict[int, Any], metadata: Metadata) -> Any:
    from PIL import Image
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    directory = ImageFileDirectory_v2(prefix=b"II")
    if metadata.exif:
        exif = Image.Exif()
        exif.load(metadata.exif)
        for tag in exif:
            directory[tag] = exif.get_ifd(tag) if tag in _SUB_DIRECTORIES else exif[tag]
    if metadata.xmp:
        directory.tagtype[_XMP] = _BYTE
        directory[_XMP] = metadata.xmp
    directory.tagtype |= {273: _LONG, 279: _LONG, _ICC_PROFILE: _UNDEFINED}
    for tag, value in tags.items():
        directory[tag] = value
    return directory
