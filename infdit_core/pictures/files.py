"""Picture files in and out, for the command line and the folder node.

A reader for each format gives pixels as they lie in the file (`decoded`); here they are turned
upright, and their colours and what else the file says become what is written with the result.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InfDiTError
from ..memory.planner import PlanError
from ..whole_files import whole_file
from . import by_pillow, colour_profile, metadata, png, tiff, tiff_writer
from .decoded import Colour, Decoded, ImageError, Piece, require_pixels
from .levels import Levels, bands, values
from .metadata import Metadata

__all__ = [
    "READABLE",
    "ImageError",
    "ImageInfo",
    "check_writable",
    "fitting",
    "has_alpha",
    "is_tiff",
    "picture_size",
    "read_image",
    "write_image",
]  # fmt: skip

_FORMATS = {
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
}
"""What can be written, by suffix."""
READABLE = frozenset([*_FORMATS, *by_pillow.SUFFIXES, ".apng"])
"""Suffixes of the files that are taken from a folder."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "WEBP": {"lossless": True, "exact": True},
    "JPEG": {"quality": 95, "subsampling": 0},
}
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError,
           RuntimeError, struct.error, zlib.error)  # fmt: skip
"""What readers raise for damaged files; most were seen when fuzzing."""
_BACK = {6: 8, 8: 6}
"""Orientations that undo another; all others undo themselves."""
_COLOURS = {"GRAY": 1, "RGB": 3, "CMYK": 4}
"""Channels of the spaces of `Decoded`, without alpha."""
_MAX_SIDE = {"WEBP": 16383, "JPEG": 65535}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageInfo:
    """What a file says about its picture."""

    bit_depth: int = 8
    """Bits per channel that the pixels were read with: 8 or 16, which stands for more too."""
    icc_profile: bytes | None = None
    """The colour profile, where it is one for RGB; sRGB if None."""
    metadata: Metadata = field(default_factory=Metadata)
    cicp: bytes | None = None
    """Code points of the colours, which rule over the profile: HDR has no other way to tell."""


def read_image(
    path: str | Path, empty: Callable[[tuple[int, ...]], Tensor] | None = None
) -> tuple[Tensor, ImageInfo]:
    """Read a picture, turned upright by its EXIF orientation; of an animation the first frame.

    Palette pictures become RGB, transparent ones RGBA. Ink and grey become sRGB by their profile;
    RGB keeps its own. The formats are those of `READABLE`, found by the file's content.

    Args:
        empty: gives float32 room on the CPU for a shape, such as that of a mapped file. TIFF is
            decoded into it tile by tile or strip by strip: no more than one of them is in memory.
            Other formats are decoded there first. What it raises comes through.

    Returns:
        (1, H, W, C) float32 in 0..1, C = 1 (grey), 3 or 4, and what is known about it.

    Raises:
        ImageError: no such file, no picture, a damaged one, one that does not fit the memory, or a
            pixel format that has no place in 0..1.
    """
    path = Path(path)
    try:
        decoded = _decoded(path)
        metadata.unwrap_raw_profiles(decoded)
        image = _image(decoded, empty)
        profile = colour_profile.profile(decoded.colour, decoded.exif)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; expected a picture") from None
    except (Image.DecompressionBombError, PlanError, MemoryError) as error:
        reason = str(error) or "not enough memory"
        raise ImageError(f"{path.name} is too large to read: {reason}") from error
    except InfDiTError:
        raise
    except _DAMAGE as error:
        # that of the system would name the file again
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ImageError(f"{path.name} cannot be read as a picture: {reason}") from error
    if decoded.frames > 1:
        logger.warning("%s holds more than one picture; the first is taken", path.name)
    bits = 8 if decoded.pixels.dtype == np.uint8 else 16
    found = ImageInfo(bits, profile, metadata.kept(decoded, path.name), decoded.colour.cicp)
    return image, found


def picture_size(path: str | Path) -> tuple[int, int] | None:
    """(height, width), upright, as a file's head says, or None where that cannot be read."""
    try:
        decoded = _decoded(Path(path), head_only=True)
        metadata.unwrap_raw_profiles(decoded)
        height, width, _ = _upright(decoded.pixels, metadata.orientation(decoded)).shape
        return height, width
    except (Image.DecompressionBombError, MemoryError, *_DAMAGE):
        return None


def has_alpha(path: str | Path) -> bool:
    """Whether a picture will be read with alpha, as its file's head says.

    Raises:
        what readers raise for a file whose head cannot be read; `picture_size` is None for it.
    """
    decoded = _decoded(Path(path), head_only=True)
    return decoded.pixels.shape[-1] > _COLOURS[decoded.space]


def is_tiff(path: str | Path) -> bool:
    """Whether a file with this name is written as TIFF, which can hold a pyramid."""
    return _FORMATS.get(Path(path).suffix.lower()) == "TIFF"


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
        alpha: whether any pixel is not opaque.
        size: (height, width) in pixels, where it is known.
        info: what the picture's file says of it, where that is known.

    Raises:
        ImageError: the suffix is unknown, or its format has no alpha, not as many bits, no sides
            of this length, or no way to tell such colours.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ImageError(f"{path.name}: expected a name that ends in {', '.join(_FORMATS)}")
    kind = _FORMATS[suffix]
    if bit_depth not in (8, 16):
        raise ImageError(f"expected 8 or 16 bits per channel, got {bit_depth}")
    if bit_depth == 16 and kind not in ("PNG", "TIFF"):
        raise ImageError(f"{path.name}: expected .png or .tif for 16 bits per channel")
    if alpha and kind == "JPEG":
        raise ImageError(f"{path.name}: JPEG has no alpha; expected .png, .webp or .tif")
    if size and max(size) > (limit := _MAX_SIDE.get(kind, 2**31 - 1)):
        raise ImageError(
            f"{path.name}: expected sides of at most {limit} px for {kind}, got"
            f" {size[1]}×{size[0]}; use .png or .tif"
        )
    if kind != "PNG" and info and (name := colour_profile.hdr(info.cicp)):
        raise ImageError(f"{path.name}: its colours are {name}, which only .png can tell here")
    if not path.parent.is_dir():
        raise ImageError(f"{path.parent} is not a folder; expected one to write to")


def fitting(path: str | Path, info: ImageInfo) -> ImageInfo:
    """What a file with this name can hold of `info`; a line in the log tells what it cannot."""
    path = Path(path)
    found, left = metadata.fitting(info.metadata, _FORMATS[path.suffix.lower()])
    if left:
        logger.warning("%s is written without %s", path.name, ", ".join(left))
    return replace(info, metadata=found)


def write_image(
    path: str | Path,
    image: Tensor,
    *,
    bit_depth: int = 8,
    info: ImageInfo | None = None,
    overwrite: bool = True,
    pyramid: bool = False,
) -> None:
    """Write a picture; the file appears whole or not at all.

    Args:
        path: ends in .png, .webp, .tif, .tiff, .jpg, .jpeg, .jpe or .jfif.
        image: (1, H, W, C) in 0..1, clipped and rounded; C = 3 or 4. An alpha that is opaque
            everywhere is not written where the format has none.
        bit_depth: 8, or for PNG and TIFF 16 bits per channel.
        info: of the picture it was made from: its colours and metadata are written, as far as the
            format holds them (`fitting`).
        overwrite: whether a file that exists is replaced.
        pyramid: whether a TIFF file holds the picture at half its size, a quarter and so on too.

    Raises:
        ImageError: see `check_writable`; the file exists; a full disk.
    """
    path, info = Path(path), info or ImageInfo()
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] not in (3, 4):
        raise ImageError(f"expected an image of shape (1, H, W, 3 or 4), got {tuple(image.shape)}")
    pixels = Levels(image, bit_depth)
    check_writable(
        path, alpha=pixels.transparent, bit_depth=bit_depth, size=pixels.shape[:2], info=info
    )
    info = fitting(path, info)
    if pyramid and not is_tiff(path):
        raise ImageError(f"{path.name}: expected .tif for a pyramid")
    try:
        with whole_file(path, overwrite=overwrite) as file:
            if is_tiff(path):
                profile, meta = info.icc_profile, info.metadata
                more = profile, meta.exif, meta.xmp, meta.iptc
                tiff_writer.write(file, pixels, *more, pyramid=pyramid)
            else:
                _encode(file, _FORMATS[path.suffix.lower()], pixels[:], info)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be written: {error}") from error


def _encode(file: Any, kind: str, pixels: np.ndarray, info: ImageInfo) -> None:
    profile, meta = info.icc_profile, info.metadata
    if kind == "PNG":
        texts = dict(meta.text)
        if meta.iptc:
            key, text = metadata.raw_profile("iptc", metadata.iptc_resource(meta.iptc))
            texts[key] = text
        png.write(file, pixels, Colour(profile, info.cicp), meta.exif, meta.xmp, texts)
        return
    options = dict(_OPTIONS[kind])
    options |= {"exif": meta.exif} if meta.exif else {}
    options |= {"xmp": meta.xmp} if meta.xmp else {}
    if kind == "JPEG":
        pixels = np.ascontiguousarray(pixels[..., :3])
        body = metadata.jpeg_iptc(meta.iptc)
        options["extra"] = struct.pack(">HH", 0xFFED, 2 + len(body)) + body if body else b""
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, format=kind, icc_profile=profile, **options)
    # Pillow itself overlooks a write that a full disk cuts short.
    file.write(encoded.getbuffer())


def _decoded(path: Path, *, head_only: bool = False) -> Decoded:
    with path.open("rb") as file:
        head = file.read(len(png.SIGNATURE))
    if head == png.SIGNATURE:
        return png.read(path, head_only=head_only)
    if head[:4] in tiff.HEADS and (decoded := tiff.read(path, head_only=head_only)):
        return decoded
    return by_pillow.read(path, head_only=head_only)


def _image(decoded: Decoded, empty: Callable[[tuple[int, ...]], Tensor] | None) -> Tensor:
    """(1, H, W, C) float32 in 0..1, upright, piece by piece."""
    icc_profile = colour_profile.usable(decoded.colour.icc_profile, decoded.space)

    def finished(pixels: np.ndarray) -> np.ndarray:
        return values(colour_profile.to_srgb(pixels, decoded.space, icc_profile))

    turned = metadata.orientation(decoded)
    height, width, _ = _upright(decoded.pixels, turned).shape
    channels = finished(decoded.pixels[:1, :1]).shape[-1]
    if empty is None:
        require_pixels(height, width, channels)
        empty = torch.empty
    image = empty((1, height, width, channels))
    lying = _upright(image[0].numpy(), _BACK.get(turned, turned))
    with closing(_pieces(decoded)) as pieces:
        for row, column, pixels in pieces:
            end = row + pixels.shape[0], column + pixels.shape[1]
            lying[row : end[0], column : end[1]] = finished(pixels)
    return image


def _pieces(decoded: Decoded) -> Generator[Piece, None, None]:
    if decoded.pieces is not None:
        yield from decoded.pieces()
        return
    height, width, channels = decoded.pixels.shape
    for band in bands(height, width * channels):
        yield band.start, 0, decoded.pixels[band]


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
