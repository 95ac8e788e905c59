"""Picture files in and out, for the command line.

Pillow does the formats, but for PNG with 16 bits per channel (`png16`) and for writing TIFF
(`tiff`). TIFF with 16 bits per channel is read in full where it is grey.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InfDiTError
from ..memory.host import require_bytes
from ..memory.planner import PlanError
from ..whole_files import whole_file
from . import png16, tiff
from .metadata import Metadata, png_texts, read_metadata, save_options

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}
READABLE = frozenset([*_FORMATS, ".apng", ".bmp", ".gif", ".jfif", ".jpe"])
"""Suffixes of the files that are taken from a folder."""
_READ_BY_PILLOW = ("PNG", "WEBP", "TIFF", "JPEG", "BMP", "GIF")
"""Whatever a file's name says. Not its other formats, of which EPS starts another program."""
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError,
           struct.error, zlib.error)  # fmt: skip
"""What Pillow's readers raise for damaged files; most were seen when fuzzing."""
_MAX_SIDE = {"WEBP": 16383, "JPEG": 65535}
_ORIENTATION_TAG = 0x0112


class ImageError(InfDiTError):
    """A picture file that cannot be read or written; the message says what was expected."""


@dataclass(frozen=True)
class ImageInfo:
    """What a file says about its picture."""

    bit_depth: int = 8
    """Bits per channel that the pixels were read with: 8 or 16."""
    icc_profile: bytes | None = None
    """The colour profile, where it is one for RGB."""
    metadata: Metadata = field(default_factory=Metadata)


def read_image(path: str | Path) -> tuple[Tensor, ImageInfo]:
    """Read a picture, turned upright by its EXIF orientation; of an animation the first frame.

    Palette pictures become RGB, transparent ones RGBA, CMYK becomes RGB. The formats are those of
    `READABLE`, found by the file's content.

    Returns:
        (1, H, W, C) float32 in 0..1, C = 1 (grey), 3 or 4, and what is known about it.

    Raises:
        ImageError: no such file, no picture, a damaged one, one that does not fit the memory, or a
            pixel format of more than 16 bits.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=_READ_BY_PILLOW) as image:
            _require_memory(image)
            image.load()
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            profile = image.info.get("icc_profile")
            metadata = read_metadata(image)
            if png16.is_png16(path):
                pixels = png16.read(path, image.info.get("transparency"))
            else:
                pixels = _pixels(image)
        values = _values(_upright(pixels, orientation))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; expected a picture") from None
    except (Image.DecompressionBombError, PlanError, MemoryError) as error:
        reason = str(error) or "not enough memory"
        raise ImageError(f"{path.name} is too large to read: {reason}") from error
    except _DAMAGE as error:
        raise ImageError(f"{path.name} cannot be read as a picture: {error}") from error
    of_rgb = profile is not None and profile[16:20] == b"RGB "
    info = ImageInfo(8 * pixels.dtype.itemsize, profile if of_rgb else None, metadata)
    return torch.from_numpy(values)[None], info


def picture_size(path: str | Path) -> tuple[int, int] | None:
    """(height, width) of a picture as its file's head says, or None where that cannot be read."""
    try:
        with Image.open(path, formats=_READ_BY_PILLOW) as image:
            return image.height, image.width
    except (Image.DecompressionBombError, MemoryError, *_DAMAGE):
        return None


def check_writable(
    path: str | Path,
    *,
    alpha: bool,
    bit_depth: int,
    size: tuple[int, int] | None = None,
    info: ImageInfo | None = None,
) -> None:
    """Refuse what `write_image` could not write, before any work is done.

    Args:
        size: (height, width), where it is known.

    Raises:
        ImageError: the suffix is unknown, or its format has no alpha, not as many bits or no sides
            of such a length.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ImageError(f"{path.name}: expected a name that ends in {', '.join(_FORMATS)}")
    if bit_depth not in (8, 16):
        raise ImageError(f"expected 8 or 16 bits per channel, got {bit_depth}")
    if bit_depth == 16 and _FORMATS[suffix][0] not in ("PNG", "TIFF"):
        raise ImageError(f"{path.name}: expected .png or .tif for 16 bits per channel")
    if alpha and _FORMATS[suffix][0] == "JPEG":
        raise ImageError(f"{path.name}: JPEG has no alpha; expected .png, .webp or .tif")
    kind = _FORMATS[suffix][0]
    if size and max(size) > (limit := _MAX_SIDE.get(kind, 2**31)):
        raise ImageError(f"{path.name}: expected sides of at most {limit} px for {kind}; use .png")
    if not path.parent.is_dir():
        raise ImageError(f"{path.parent} is not a folder; expected one to write to")


def write_image(
    path: str | Path,
    image: Tensor,
    *,
    bit_depth: int = 8,
    info: ImageInfo | None = None,
    overwrite: bool = True,
) -> None:
    """Write a picture; the file appears whole or not at all.

    Args:
        path: ends in .png, .webp, .tif, .tiff, .jpg or .jpeg.
        image: (1, H, W, C) in 0..1, clipped and rounded; C = 3 or 4.
        bit_depth: 8, or for PNG and TIFF 16 bits per channel.
        info: of the picture it was made from: its colour profile and metadata are written.
        overwrite: whether a file that exists is replaced.

    Raises:
        ImageError: see `check_writable`; a side too long for the format; the file exists; a full
            disk.
    """
    path = Path(path)
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] not in (3, 4):
        raise ImageError(f"expected an image of shape (1, H, W, 3 or 4), got {tuple(image.shape)}")
    size = image.shape[1], image.shape[2]
    check_writable(path, alpha=image.shape[-1] == 4, bit_depth=bit_depth, size=size, info=info)
    kind, options = _FORMATS[path.suffix.lower()]
    levels = 2**bit_depth - 1
    values = (image[0].cpu().float().clip(0, 1) * levels).round().numpy()
    kept = np.uint16 if bit_depth == 16 else np.uint8
    info = info or ImageInfo()
    try:
        with whole_file(path, overwrite=overwrite) as file:
            if kind == "TIFF":
                tiff.write(file, values.astype(kept), info.icc_profile, info.metadata)
            elif bit_depth == 16:
                texts = png_texts(info.metadata).chunks
                png16.write(file, values.astype(kept), info.icc_profile, info.metadata.exif, texts)
            else:
                options = options | save_options(kind, info.metadata)
                picture, encoded = Image.fromarray(values.astype(kept)), BytesIO()
                picture.save(encoded, format=kind, icc_profile=info.icc_profile, **options)
                # Pillow itself overlooks a write that a full disk cuts short.
                file.write(encoded.getbuffer())
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be written: {error}") from error


def _require_memory(image: Image.Image) -> None:
    """Refuse a picture whose pixels as float32 cannot fit, before any of them is decoded."""
    width, height = image.size
    needed = width * height * len(image.getbands()) * np.dtype(np.float32).itemsize
    require_bytes(needed, f"{width}×{height} px", "a smaller picture")


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 or uint16."""
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)[..., None]
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per channel; expected 8 or 16")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _values(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1, 3 or 4) float32 in 0..1 of unsigned integers."""
    values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if values.shape[-1] == 2:  # grey with alpha
        values = values[..., [0, 0, 0, 1]]
    return np.ascontiguousarray(values)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
