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
    """Photographs that `photos.py` collected, memory-mapped.

    Args:
        folder: of (H, W, 3) uint8 .npy files.
        crop_px: side of the crops.
    """

    def __init__(self, folder: Path, crop_px: int) -> None:
        self._crop = crop_px
        pictures = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
        self._pictures = [p for p in pictures if min(p.shape[:2]) >= crop_px]
        if not self._pictures:
            raise ValueError(f"{folder}: no picture of at least {crop_px} px")
        areas = np.array([p.shape[0] * p.shape[1] for p in self._pictures], dtype=float)
        self._weights = np.sqrt(areas) / np.sqrt(areas).sum()  # neither per photo nor per pixel

    def batch(self, size: int, generator: np.random.Generator) -> Tensor:
        """(size, 3, crop, crop) float32 in [-1, 1], flipped and turned at random."""
        return torch.stack([self._one(generator) for _ in range(size)])

    def _one(self, generator: np.random.Generator) -> Tensor:
        crop = self._crop_of_one(generator)
        if detail(crop) < FLAT:  # sky and blur again and again teach little
            crop = self._crop_of_one(generator)
        crop = np.rot90(crop, int(generator.integers(4)))
        if generator.integers(2):
            crop = crop[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)
        return tensor.float() / 127.5 - 1

    def _crop_of_one(self, generator: np.random.Generator) -> np.ndarray:
        picture = self._pictures[generator.choice(len(self._pictures), p=self._weights)]
        top, left = (int(generator.integers(side - self._crop + 1)) for side in picture.shape[:2])
        return np.asarray(picture[top : top + self._crop, left : left + self._crop])


def detail(crop: np.ndarray) -> float:
    """Mean absolute difference between neighbours, in levels, of a (H, W, 3) uint8 picture."""
    levels = crop.astype(np.int16)
    return float(np.mean([np.abs(np.diff(levels, axis=axis)).mean() for axis in (0, 1)]))


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
