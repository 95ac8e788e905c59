"""The prior: a small convolution network that enlarges a picture before diffusion refines it.

It runs at the size of the LR picture and adds a correction to bicubic interpolation. A pixel of the
correction depends on the LR pixels within `Prior.reach` of it and on nothing else, so bands of a
picture with that many rows around them give the same pixels as the whole picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..precision import exact_convolutions
from .config import LR_SCALE

BAND_PX = 2**18
"""LR pixels that `Prior.add_to` takes at a time, besides the rows around them."""


class Residual(nn.Module):
    """x + b(silu(a(x))) with 3×3 convolutions: (B, width, h, w) -> the same."""

    def __init__(self, width: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.a = ops.Conv2d(width, width, 3, padding=1, **factory)
        self.b = ops.Conv2d(width, width, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.silu(self.a(x)))


class Prior(nn.Module):
    """What a regression adds to an interpolated picture.

    Args:
        width: channels.
        depth: residual pairs of convolutions.
        dtype, device: of the parameters.
        operations: where the layer classes come from: `torch.nn`, or one of ComfyUI's `comfy.ops`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.head = operations.Conv2d(3, width, 3, padding=1, **factory)
        self.body = nn.ModuleList(Residual(width, factory, operations) for _ in range(depth))
        self.tail = operations.Conv2d(width, 3 * LR_SCALE**2, 3, padding=1, **factory)

    @property
    def reach(self) -> int:
        """LR pixels in each direction that a pixel depends on: one for each 3×3 convolution."""
        return 2 * len(self.body) + 2

    def forward(self, lr: Tensor) -> Tensor:
        """The correction: (B, 3, h, w) about [-1, 1] -> (B, 3, 4h, 4w), in the dtype of lr."""
        with exact_convolutions(lr.dtype):
            first = self.head(lr)  # (B, width, h, w)
            x = first
            for pair in self.body:
                x = pair(x)
            return F.pixel_shuffle(self.tail(x + first), LR_SCALE)

    def add_to(
        self,
        picture: Tensor,
        lr: Tensor,
        device: torch.device | str,
        dtype: torch.dtype,
        band_px: int = BAND_PX,
    ) -> Tensor:
        """Add the correction to a picture (B, 3, 4h, 4w), in bands of rows; returns the picture.

        Args:
            picture: on the device of lr, and changed.
            lr: (B, 3, h, w), on any device.
            device, dtype: of the computation.
            band_px: LR pixels of a band.
        """
        height, width = lr.shape[-2:]
        rows = max(1, band_px // (len(lr) * width))
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first = max(0, top - self.reach)
            band = lr[:, :, first : bottom + self.reach].to(device, dtype)
            inside = slice(LR_SCALE * (top - first), LR_SCALE * (bottom - first))
            correction = self(band)[:, :, inside]
            picture[:, :, LR_SCALE * top : LR_SCALE * bottom] += correction.to(picture)
            del band, correction  # they would live into the next turn
        return picture


def interpolate(lr: Tensor) -> Tensor:
    """Bicubic interpolation to four times the size, clipped: (B, 3, h, w) -> (B, 3, 4h, 4w)."""
    enlarged = F.interpolate(
        lr, scale_factor=LR_SCALE, mode="bicubic", antialias=True, align_corners=False
    )
    return enlarged.clamp(-1, 1)
