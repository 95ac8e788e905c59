"""Textures and panoramas: pictures that go on around at their edges.

The canvas gets a margin that repeats the other side of the picture. What is drawn in the margin is
thrown away in every evaluation and the other side's taken in its place: so the picture that the
solver works on goes on around in every step, and blocks at the edge see what really lies there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..network.config import LR_SCALE
from .prepare import Canvas, PreparationError, Wrap, check_image, check_sizes, prepare

WRAPS = ("none", "horizontal", "both")
"""Which edges go on around: none, left and right, or all four."""
MARGIN_BLOCKS = 1
"""Of context before the first block; a block sees more, of less and less weight.

Energy of the third difference over the seam, in shares of that at the same places within the
picture, for 8 photographs and the bundled model: 4.7 without wrap; with one block behind, 2.0, 0.7,
0.9 and 0.8 for 0, 1, 2 and 4 blocks before; 1.5 for 1 block before and none behind.
"""
AFTER_BLOCKS = 1
"""Of context behind the last block, of which only the LR picture is seen."""


@dataclass(frozen=True)
class _Axis:
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

    def resize(self, x: Tensor, dim: int, shrink: int = 1) -> Tensor:
        """The axis `dim` of a picture as on the canvas, or `shrink` times smaller.

        Bicubic with antialiasing (a = -0.5), as `prepare` resizes.
        """
        scale = self.target / self.source / shrink
        start, count = -self.before // shrink, self.padded // shrink
        centre = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) / scale - 0.5
        reach = max(1.0, 1 / scale)
        first = (centre - 2 * reach).floor().long()[:, None]
        taps = first + torch.arange(math.ceil(4 * reach) + 2)  # (count, taps)
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
        weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
        used = weights.any(0)
        used[0] = True
        weights, taps = weights[:, used].to(x.device), taps[:, used].to(x.device)
        shape = [1] * x.ndim
        shape[dim] = count
        parts = zip(weights.unbind(1), taps.unbind(1), strict=True)
        weight, tap = next(parts)
        result = weight.reshape(shape) * x.index_select(dim, tap)
        for weight, tap in parts:
            result += weight.reshape(shape) * x.index_select(dim, tap)
        return result


def check_wrap(wrap: str, colour_fix: str = "none") -> None:
    """Raise PreparationError unless `wrap` is one of `WRAPS` and the colours can be fixed with it.

    The wavelet fix compares blurred pictures, and the blur ends at the edges.
    """
    if wrap not in WRAPS:
        raise PreparationError(f"expected wrap to be one of {', '.join(WRAPS)}; got {wrap!r}")
    if wrap != "none" and colour_fix == "wavelet":
        raise PreparationError(
            f"expected colour_fix none, adain or lab with wrap {wrap}; got wavelet, which makes a"
            " seam"
        )


def lay_out(image: Tensor, size: tuple[int, int], block_px: int, wrap: str = "none") -> Canvas:
    """`prepare`, or `prepare_wrapped` where edges of the picture go on around."""
    if wrap == "none":
        return prepare(image, size=size, block_px=block_px)
    return prepare_wrapped(image, size, block_px, wrap)


def prepare_wrapped(
    image: Tensor,
    size: tuple[int, int],
    block_px: int,
    wrap: str,
    *,
    margin: int = MARGIN_BLOCKS,
    after: int = AFTER_BLOCKS,
) -> Canvas:
    """Lay a picture that goes on around out for upscaling, as `prepare` does others.

    Args:
        image: (B, H, W, C) in 0..1, C = 1 (grey), 3 or 4 (alpha).
        size: (height, width) of the result in pixels.
        block_px: side of a block of the model.
        wrap: "horizontal" or "both".
        margin: blocks of context before the picture.
        after: blocks of context behind it.

    Raises:
        PreparationError: not a picture, not finite, or a size of nothing.
    """
    check_image(image)
    check_sizes(image, size)
    rows, columns = (
        _Axis.of(side, target, block_px, around, margin, after)
        for side, target, around in zip(image.shape[1:3], size, (wrap == "both", True), strict=True)
    )
    pixels = image.float().permute(0, 3, 1, 2).clamp(0, 1)

    def resized(x: Tensor, shrink: int = 1) -> Tensor:
        return columns.resize(rows.resize(x, -2, shrink), -1, shrink)

    alpha = None
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:]
        for dim, axis in ((-2, rows), (-1, columns)):
            alpha = replace(axis, before=0, padded=axis.target).resize(alpha, dim)
        alpha = alpha.clamp(0, 1).permute(0, 2, 3, 1)
    source = pixels[:, :3].expand(-1, 3, -1, -1) * 2 - 1
    return Canvas(
        resized(source).clamp(-1, 1),
        resized(source, LR_SCALE),
        *size,
        image,
        alpha,
        top=rows.before,
        left=columns.before,
        wrap=Wrap(rows.index(), columns.index()),
    )


def _cubic(x: Tensor) -> Tensor:
    """The bicubic kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
