"""Between numbers in 0..1 and the levels of a file, band by band: nothing else is of full size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

_BAND_VALUES = 2**20
"""Of a band: its temporaries are a few megabytes, and it is worth a call."""


def bands(height: int, row_values: int) -> Iterator[slice]:
    """The rows of a picture in order, as many at a time as a band holds.

    Args:
        height: rows of the picture.
        row_values: numbers in a row.
    """
    rows = max(1, _BAND_VALUES // row_values)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def values(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) of `Decoded` -> (H, W, 1, 3 or 4) float32 in 0..1."""
    if pixels.dtype.kind == "u":
        pixels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return pixels[..., [0, 0, 0, 1]] if pixels.shape[-1] == 2 else pixels  # grey with alpha


class Levels:
    """A picture as a file holds it, (H, W, C) uint8 or uint16; rows are made when asked for."""

    def __init__(self, image: Tensor, bit_depth: int) -> None:
        """
        Args:
            image: (1, H, W, C) in 0..1, clipped and rounded.
            bit_depth: 8 or 16.
        """
        self._image = image[0]
        height, width, channels = self._image.shape
        self.shape = height, width, channels
        self.dtype = np.dtype(np.uint16 if bit_depth == 16 else np.uint8)
        self.nbytes = height * width * channels * self.dtype.itemsize
        self._full = 2**bit_depth - 1

    def __getitem__(self, rows: slice) -> np.ndarray:
        """(h, W, C) of rows, all of them for `[:]`."""
        image = self._image[rows]
        made = np.empty(image.shape, self.dtype)
        for band in bands(len(image), self.shape[1] * self.shape[2]):
            # not in place before `clip`, whose result is a copy
            part = image[band].cpu().float().clip(0, 1).mul_(self._full).round_()
            made[band] = part.numpy()
        return made

    @property
    def transparent(self) -> bool:
        """Whether a pixel is not opaque."""
        height, width, channels = self.shape
        if channels < 4:
            return False
        alpha = Levels(self._image[None, ..., 3:], 16 if self.dtype.itemsize == 2 else 8)
        return any(bool((alpha[band] < self._full).any()) for band in bands(height, width))
