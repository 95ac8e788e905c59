"""Random crops of photographs and their degradation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infdit_core.network.condition import Condition
from infdit_core.network.config import LR_SCALE

FLAT = 2.0
"""Detail in levels below which a crop is drawn again, once."""


class Photos:
    """Photographs that `photos.py` collected, all in the memory of a device.

    Args:
        folder: of (H, W, 3) uint8 .npy files.
        crop_px: side of the crops.
    """

    def __init__(self, folder: Path, crop_px: int, device: torch.device | str = "cpu") -> None:
        self._crop = crop_px
        pictures = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
        pictures = [p for p in pictures if min(p.shape[:2]) >= crop_px]
        if not pictures:
            raise ValueError(f"{folder}: no picture of at least {crop_px} px")
        self._sides = np.array([p.shape[:2] for p in pictures])
        areas = self._sides.prod(axis=1)
        self._starts = np.cumsum(areas) - areas
        self._weights = np.sqrt(areas) / np.sqrt(areas).sum()  # neither per photo nor per pixel
        self._pixels = torch.empty(int(areas.sum()), 3, dtype=torch.uint8, device=device)
        for start, picture in zip(self._starts, pictures, strict=True):
            pixels = torch.from_numpy(np.array(picture)).flatten(0, 1)  # (H·W, 3)
            self._pixels[start : start + len(pixels)] = pixels

    def batch(self, size: int, generator: np.random.Generator, side: int | None = None) -> Tensor:
        """(size, 3, side, side) float32 in [-1, 1], flipped and turned at random.

        Args:
            side: at most, and unless given, that of the crops.
        """
        side = side or self._crop
        first, second = self._crops(2 * size, side, generator).chunk(2)
        flat = detail(first) < FLAT  # sky and blur again and again teach little
        crops = torch.where(flat[:, None, None, None], second, first)
        return crops.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _crops(self, count: int, side: int, generator: np.random.Generator) -> Tensor:
        """(count, side, side, 3) uint8."""
        chosen = generator.choice(len(self._sides), count, p=self._weights)
        top, left = generator.integers(self._sides[chosen] - side + 1).T
        width = self._sides[chosen, 1]
        corner = self._starts[chosen] + top * width + left
        strides = np.stack([width, np.ones_like(width)])  # to the next row and to the next column
        turned = generator.random(count) < 0.5
        strides = np.where(turned, strides[::-1], strides)
        for stride in strides:
            flipped = generator.random(count) < 0.5
            corner += np.where(flipped, (side - 1) * stride, 0)
            stride[flipped] *= -1
        start, down, right = torch.from_numpy(np.stack([corner, *strides])).to(
            self._pixels.device, non_blocking=True
        )
        along = torch.arange(side, device=self._pixels.device)
        rows = start[:, None] + down[:, None] * along  # (count, side)
        return self._pixels[rows[:, :, None] + right[:, None, None] * along]


def detail(crops: Tensor) -> Tensor:
    """Mean absolute difference between neighbours, in levels: uint8 (..., H, W, 3) -> (...)."""
    levels = crops.half()  # exact to 2048
    down, right = levels.diff(dim=-3).abs(), levels.diff(dim=-2).abs()
    return (
        down.mean(dim=(-3, -2, -1), dtype=torch.float32)
        + right.mean(dim=(-3, -2, -1), dtype=torch.float32)
    ) / 2


def reduce_bicubic(picture: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 3, H/4, W/4) in 8-bit levels, as a user's picture has them."""
    reduced = F.interpolate(
        picture, scale_factor=1 / LR_SCALE, mode="bicubic", antialias=True, align_corners=False
    )
    return ((reduced.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def local_variance(lr: Tensor) -> Tensor:
    """(B, 1, H, W) variance of the 3×3 pixels around each of (B, 3, H, W), mean of the channels."""
    padded = F.pad(lr, (1, 1, 1, 1), mode="replicate")
    variance = F.avg_pool2d(padded.square(), 3, 1) - F.avg_pool2d(padded, 3, 1).square()
    return variance.mean(dim=1, keepdim=True).clamp(min=0)


def condition(lr: Tensor, origin: tuple[int, int] = (0, 0)) -> Condition:
    """The condition of a model without CLIP for a low-resolution picture (B, 3, h, w)."""
    concat = F.interpolate(
        lr, scale_factor=LR_SCALE, mode="bicubic", antialias=True, align_corners=False
    )
    return Condition(concat.clamp(-1, 1), lr, origin=origin)


def random_origin(
    generator: np.random.Generator, block_patches: int, blocks: int = 256
) -> tuple[int, int]:
    """Random rotary start positions, whole blocks, so that a crop is like any other place."""
    row, column = (int(n) * block_patches for n in generator.integers(blocks, size=2))
    return row, column


def middle(x: Tensor, edge: int) -> Tensor:
    """A (..., H, W) without the `edge` pixels along each side."""
    height, width = x.shape[-2:]
    return x[..., edge : height - edge, edge : width - edge].contiguous()
