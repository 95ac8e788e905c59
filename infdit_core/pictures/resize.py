"""Bicubic resizing with antialiasing, of a picture or of a band of its rows.

A band has the bits of those rows of the whole, which torch's own resizing of a crop has not: places
are reckoned in float64 from the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bands import row_bands
from ..network.config import LR_SCALE


@dataclass(frozen=True)
class Axis:
    """One axis of a canvas."""

    source: int
    """Pixels of the picture."""
    target: int
    """Pixels of the result."""
    before: int
    """Pixels of margin before the result."""
    padded: int
    """Pixels of the canvas."""
    around: bool

    @classmethod
    def of(cls, source: int, target: int, block_px: int, around: bool, margin: int, after: int):
        blocks = math.ceil(target / block_px)
        if not around:
            return cls(source, target, 0, blocks * block_px, around)
        return cls(source, target, margin * block_px, (margin + blocks + after) * block_px, around)

    def index(self) -> Tensor | None:
        """Which pixel of the canvas each pixel of it is the same as."""
        if not self.around:
            return None
        return (torch.arange(self.padded) - self.before) % self.target + self.before

    def taps(self, shrink: int = 1, pixels: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Which pixels of the picture make each of some `pixels` of the canvas, and their weights.

        Bicubic with antialiasing (a = -0.5), as `prepare` resizes.

        Args:
            shrink: how many times smaller the canvas is than said.
            pixels: of it, all by default.

        Returns:
            (n, taps) int64 and float64.
        """
        scale = self.target / self.source / shrink
        first, last, _ = pixels.indices(self.padded // shrink)
        place = torch.arange(first, last, dtype=torch.float64) - self.before // shrink
        centre = (place + 0.5) / scale - 0.5
        reach = max(1.0, 1 / scale)
        start = (centre - 2 * reach).floor().long()[:, None]
        taps = start + torch.arange(math.ceil(4 * reach) + 2)
        weights = _cubic((taps - centre[:, None]) / reach)
        if self.around:
            taps = taps % self.source
        else:
            weights[taps < 0] = 0
            if self.padded == self.target:
                weights[taps >= self.source] = 0
            period = max(1, 2 * (self.source - 1))
            taps = taps % period
            taps = torch.where(taps < self.source, taps, period - taps)
        return taps, weights / weights.sum(1, keepdim=True)

    def resize(self, x: Tensor, dim: int, shrink: int = 1) -> Tensor:
        """The axis `dim` of a picture as on the canvas, or `shrink` times smaller."""
        return _weighed(x, dim, *self.taps(shrink))


def resized(
    rows: Axis, columns: Axis, source: Callable[[slice], Tensor], shrink: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """A picture as on a canvas that does not go around, or `shrink` times smaller, band by band.

    Args:
        source: gives rows of the picture, (B, C, r, w).

    Yields:
        rows of the canvas, and (B, C, r, W) what is there.
    """
    for band in row_bands(rows.padded // shrink, 3 * max(columns.padded // shrink, columns.source)):
        taps, weights = rows.taps(shrink, band)
        used = taps[weights != 0]
        first = int(used.min())
        taken = source(slice(first, int(used.max()) + 1))
        taps = (taps - first).clamp(0, taken.shape[-2] - 1)  # those beyond weigh nothing
        yield band, _across(_weighed(taken, -2, taps, weights), columns, shrink)


def _across(x: Tensor, axis: Axis, shrink: int) -> Tensor:
    """Whole rows (..., w) as on the canvas: torch's own resizing, which has no band to mistake."""
    width, scale = axis.padded // shrink, axis.target / axis.source / shrink
    if axis.padded == axis.target and width * shrink == axis.target:
        return enlarge(x, (x.shape[-2], width))
    x = extend(x, x.shape[-2], reach(axis.target, axis.padded, axis.target / axis.source))
    return resize(x, (1.0, scale), (x.shape[-2], width))


def axes(x: Tensor, out: Tensor) -> tuple[Axis, Axis]:
    """Of a picture (..., h, w) that becomes (..., H, W), and ends where it ends."""
    sides = zip(x.shape[-2:], out.shape[-2:], strict=True)
    rows, columns = (Axis(side, target, 0, target, around=False) for side, target in sides)
    return rows, columns


def resize_into(out: Tensor, x: Tensor, then: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A picture (B, C, h, w) at the size of `out` (B, C, H, W), written there band by band.

    Args:
        then: what becomes of a band before it is written.
    """
    for band, values in resized(*axes(x, out), lambda rows: x[..., rows, :]):
        out[..., band, :] = values if then is None else then(values)
    return out


def _weighed(x: Tensor, dim: int, taps: Tensor, weights: Tensor) -> Tensor:
    """Sums of the pixels `taps` (n, k) along an axis, times their weights."""
    used = weights.any(0)
    used[0] = True
    weights, taps = (t[:, used].to(x.device) for t in (weights.to(x.dtype), taps))
    shape = [1] * x.ndim
    shape[dim] = len(taps)
    parts = zip(weights.unbind(1), taps.unbind(1), strict=True)
    weight, tap = next(parts)
    result = weight.reshape(shape) * x.index_select(dim, tap)
    for weight, tap in parts:
        result += weight.reshape(shape) * x.index_select(dim, tap)
    return result


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) of a whole picture at a size (H, W), by torch."""
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


def resize(x: Tensor, scale: tuple[float, ...], size: tuple[int, ...]) -> Tensor:
    """A whole picture by exactly `scale`, cropped to `size`, by torch."""
    if scale != (1.0, 1.0):
        x = F.interpolate(
            x,
            scale_factor=scale,
            mode="bicubic",
            antialias=True,
            align_corners=False,
            recompute_scale_factor=False,
        )
    return x[..., : size[0], : size[1]]


def extend(x: Tensor, height: int, width: int) -> Tensor:
    """Continue a picture (..., h, w) to the bottom and right by reflection, however far."""
    for dim, length in ((-2, height), (-1, width)):
        if (side := x.shape[dim]) < length:
            period = max(1, 2 * (side - 1))
            index = torch.arange(length, device=x.device) % period
            x = x.index_select(dim, torch.where(index < side, index, period - index))
    return x


def reach(target: int, padded: int, scale: float) -> int:
    """Source pixels that resizing by `scale` turns into at least `padded`."""
    reach = math.ceil(padded / scale - 1e-9)  # 75 · (300 / 75) is not exactly 300 in floats
    while math.floor(reach * scale) < padded:
        reach += 1
    if padded == target:
        return reach  # the kernel does not reach beyond the picture's own edge
    return reach + 2 * math.ceil(max(1, LR_SCALE / scale))  # the reach of the bicubic kernel


def _cubic(x: Tensor) -> Tensor:
    """The bicubic kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
