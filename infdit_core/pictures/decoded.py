"""What a reader of a picture format hands over: pixels, and what the file says beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..errors import InfDiTError
from ..memory.host import require_bytes


class ImageError(InfDiTError):
    """A picture file that cannot be read or written; the message says what was expected."""


@dataclass
class Colour:
    """How a file says what the numbers of its pixels mean; sRGB where it says nothing."""

    icc_profile: bytes | None = None
    cicp: bytes | None = None
    """Primaries, transfer, matrix and range, a byte each (ITU-T H.273); rules over a profile."""
    gamma: float | None = None
    """As gAMA of PNG has it: a value is light to this power; 1 is linear, 0.4545 usual."""
    chromaticities: tuple[float, ...] | None = None
    """x and y of white, red, green and blue, as cHRM of PNG has them."""


Piece = tuple[int, int, np.ndarray]
"""Row and column of pixels (h, w, C) that are a part of a picture."""


@dataclass
class Decoded:
    """A picture as it lies in its file, not yet upright and in the file's own colours."""

    pixels: np.ndarray
    """(H, W, C) uint8, uint16, or float32 in 0..1, full range; C = 1 (grey), 2 (grey, alpha), 3, 4,
    and of CMYK 4 or 5 with 0 for no ink. `blank` where they come in pieces."""
    space: str = "RGB"
    """Colours of the pixels: GRAY, RGB or CMYK."""
    colour: Colour = field(default_factory=Colour)
    exif: Image.Exif = field(default_factory=Image.Exif)
    xmp: bytes | None = None
    iptc: bytes | None = None
    """Datasets of IPTC-IIM, without the resource of Photoshop around them."""
    text: Mapping[str, str] = field(default_factory=dict)
    """Texts of a PNG file by keyword."""
    frames: int = 1
    """Pictures in the file, of which this is the first."""
    pieces: Callable[[], Iterable[Piece]] | None = None
    """Reads the pixels piece by piece, each of them once, and raises what a reader raises."""


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without a library's own lines in the log: what is wrong with a file, our error tells."""
    log = logging.getLogger(name)
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def blank(height: int, width: int, channels: int, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """What stands for pixels that were not read, or not yet; takes no memory."""
    return np.broadcast_to(dtype(0), (height, width, channels))


def require_pixels(height: int, width: int, channels: int) -> None:
    """Refuse a picture whose pixels as float32 cannot fit, before any of them is decoded.

    Raises:
        PlanError: see `require_bytes`.
    """
    needed = height * width * channels * np.dtype(np.float32).itemsize
    require_bytes(needed, f"{width}×{height} px", "a smaller picture")
