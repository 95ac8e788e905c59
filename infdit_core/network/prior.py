"""The prior: a small convolution network that enlarges a picture before diffusion refines it.

It runs at the size of the LR picture and adds a correction to bicubic interpolation. A pixel of its
result depends on the LR pixels within `Prior.reach` of it and on nothing else, so bands of a picture
with that many rows around them give the same pixels as the whole picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LR_SCALE


class Residual(nn.Module):
    """x + b(silu(a(x))) with 3×3 convolutions: (B, width, h, w) -> the same."""

    def __init__(self, width: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.a = ops.Conv2d(width, width, 3, padding=1, **factory)
        self.b = ops.Conv2d(width, width, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.silu(self.a(x)))


class Prior(nn.Module):
    """P, the enlarged picture: what a regression makes of an LR picture.

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
        """LR pixels in each direction that a pixel of the result depends on.

        One for each 3×3 convolution; the kernel of bicubic interpolation, two, is within that.
        """
        return 2 * len(self.body) + 2

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) about [-1, 1] -> (B, 3, 4h, 4w) in the dtype of lr, not clipped."""
        first = self.head(lr.to(self.head.weight.dtype))  # (B, width, h, w)
        x = first
        for pair in self.body:
            x = pair(x)
        correction = F.pixel_shuffle(self.tail(x + first), LR_SCALE)  # (B, 3, 4h, 4w)
        return enlarge(lr) + correction.to(lr.dtype)


def enlarge(lr: Tensor) -> Tensor:
    """Bicubic interpolation to four times the size, clipped: (B, 3, h, w) -> (B, 3, 4h, 4w)."""
    enlarged = F.interpolate(
        lr, scale_factor=LR_SCALE, mode="bicubic", antialias=True, align_corners=False
    )
    return enlarged.clamp(-1, 1)
