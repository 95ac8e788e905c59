"""Colours of invisible pixels, which a network, a resampling or a mean must not see.

Programs leave anything under alpha 0, mostly black; it would come out as a rim around what is
visible. So it is replaced by what is visible near by: push-pull (Gortler et al., "The Lumigraph",
1996), means of colours times alpha in cells that double their side, each interpolated where the
finer one sees nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_invisible(image: Tensor, around: tuple[bool, bool] = (False, False)) -> Tensor:
    """Pictures whose pixels of alpha 0 have the colours of visible ones near by.

    Args:
        image: (B, H, W, C) in 0..1 and finite, C = 1, 3 or 4 (alpha); it is not changed.
        around: whether the picture goes on around (above and below, left and right).

    Returns:
        (B, H, W, C), all else to the bit as in `image`; `image` itself where there is nothing to
        fill or nothing visible. The work takes the result and one picture more.
    """
    if image.shape[-1] != 4:
        return image
    holes = image[..., 3] <= 0  # (B, H, W)
    unfinished = holes.any((1, 2)) & ~holes.all((1, 2))
    if not unfinished.any():
        return image
    filled = image.clone()
    for i in unfinished.nonzero()[:, 0].tolist():
        colours = filled[i : i + 1, ..., :3].permute(0, 3, 1, 2)  # (1, 3, H, W), a view
        found = _interpolated(_coarser(_premultiplied(image[i : i + 1])), holes.shape[1:], around)
        torch.where(holes[i], found.to(colours), colours, out=colours)
    return filled


def _premultiplied(image: Tensor) -> Tensor:
    """A (1, H, W, 4) as (1, 4, H, W) float32, colours times alpha beside alpha."""
    pixels = image.permute(0, 3, 1, 2).float().clamp(0, 1)
    return torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1)


def _coarser(sums: Tensor) -> Tensor:
    """(1, 4, h, w) at half the size, rounded up; what lies beyond the edge counts as invisible."""
    return F.avg_pool2d(sums, 2, ceil_mode=True, divisor_override=4)


def _interpolated(sums: Tensor, size: torch.Size, around: tuple[bool, bool]) -> Tensor:
    """Colours (1, 3, *size) at double the size of premultiplied (1, 4, h, w), nowhere invisible."""
    weight = sums[:, 3:]
    colours = sums[:, :3] / weight.clamp(min=torch.finfo(sums.dtype).tiny)
    if not weight.all():
        coarser = _interpolated(_coarser(sums), sums.shape[-2:], around)
        colours = torch.where(weight > 0, colours, coarser)
    for pad, goes_on in (((0, 0, 1, 1), around[0]), ((1, 1, 0, 0), around[1])):
        colours = F.pad(colours, pad, mode="circular" if goes_on else "replicate")
    large = F.interpolate(colours, scale_factor=2, mode="bilinear")
    return large[..., 2 : 2 + size[0], 2 : 2 + size[1]]
