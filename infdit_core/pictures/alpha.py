"""Colours of invisible pixels, which a network, a resampling or a mean must not see.

Programs leave anything under alpha 0, mostly black; it would come out as a rim around what is
visible. So it is replaced by what is visible near by: push-pull (Gortler et al., "The Lumigraph",
1996), means of colours times alpha in cells that double their side, the coarser interpolated where
the finer see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_STRIP_PX = 2**20
"""Pixels worked on at a time at full size."""
_VISIBLE = 0.5 / 65535
"""The least alpha that a file can show; resized masks have less where they should have none."""


def fill_invisible(image: Tensor, wrap: str = "none") -> Tensor:
    """Pictures whose invisible pixels have the colours of visible ones near by.

    Args:
        image: (B, H, W, C) in 0..1 and finite, C = 1, 3 or 4 (alpha); it is not changed.
        wrap: one of `WRAPS`, the edges where the pictures go on around.

    Returns:
        (B, H, W, C), all else to the bit as in `image`; `image` itself where there is nothing to
        fill or nothing visible. The work takes about as much memory as the result.
    """
    if image.shape[-1] != 4:
        return image
    holes = image[..., 3] < _VISIBLE  # (B, H, W)
    unfinished = holes.any((1, 2)) & ~holes.all((1, 2))
    if not unfinished.any():
        return image
    filled = image.clone()
    for i in (i for i in range(len(image)) if unfinished[i]):
        pixels = filled[i : i + 1].permute(0, 3, 1, 2)  # (1, 4, H, W), a view
        cells = torch.cat([_cells(pixels, rows) for rows in _strips(pixels)], dim=-2)
        found = _padded(_visible(cells, wrap), wrap)
        del cells
        for rows in _strips(pixels):
            colours, seen = pixels[:, :3, rows], slice(rows.start // 2, rows.stop // 2 + 3)
            large = _finer(found[..., seen, :], colours.shape[-2:]).to(colours)
            torch.where(holes[i, rows], large, colours, out=colours)
    return filled


def _cells(pixels: Tensor, rows: slice) -> Tensor:
    """Rows of pixels (1, 4, H, W) at half the size, float32: colours times alpha, and alpha."""
    before = min(2, rows.start)
    pixels = pixels[..., rows.start - before : rows.stop + 2, :].float().clamp(0, 1)
    alpha = F.threshold(pixels[:, 3:], _VISIBLE, 0)
    cells = _coarser(torch.cat([pixels[:, :3] * alpha, alpha], dim=1))
    return cells[..., before // 2 :, :][..., : (rows.stop - rows.start + 1) // 2, :]


def _visible(sums: Tensor, wrap: str) -> Tensor:
    """The colours (1, 3, h, w) of premultiplied (1, 4, h, w), without holes."""
    weight = sums[:, 3:]
    colours = sums[:, :3] / weight.clamp(min=torch.finfo(sums.dtype).tiny)
    if weight.all():
        return colours
    coarser = _padded(_visible(_coarser(sums), wrap), wrap)
    return torch.where(weight > 0, colours, _finer(coarser, sums.shape[-2:]))


def _coarser(sums: Tensor) -> Tensor:
    """(1, 4, h, w) at half the size, rounded up; beyond the edge nothing is visible.

    Cells overlap, so that the first one in a hole has the colours of the hole's edge alone.
    """
    return F.avg_pool2d(sums, 4, 2, padding=1, ceil_mode=True, divisor_override=16)


def _padded(colours: Tensor, wrap: str) -> Tensor:
    """Colours with what lies one pixel beyond their edges."""
    for pad, around in (((0, 0, 1, 1), wrap == "both"), ((1, 1, 0, 0), wrap != "none")):
        colours = F.pad(colours, pad, mode="circular" if around else "replicate")
    return colours


def _finer(padded: Tensor, size: torch.Size) -> Tensor:
    """Colours at double the size: (1, 3, *size) of what `_coarser` made (1, 3, h, w) of."""
    large = F.interpolate(padded, scale_factor=2, mode="bilinear")
    return large[..., 2 : 2 + size[0], 2 : 2 + size[1]]


def _strips(pixels: Tensor) -> Iterator[slice]:
    """Rows that begin with whole cells."""
    height, width = pixels.shape[-2:]
    step = max(1, _STRIP_PX // (2 * width)) * 2
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))
