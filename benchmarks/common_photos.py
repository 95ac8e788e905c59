"""Held-out photographs, the inputs made of them, and the baseline: a library."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from infdit_core import InfDiT, upscale
from infdit_core.network.condition import Condition
from infdit_core.network.config import LR_SCALE
from training.data import condition, reduce_bicubic
from training.degrade import reduce_realistic

DEGRADATIONS = ("bicubic", "realesrgan")
Upscaler = Callable[[Tensor], Tensor]
"""From (1, 3, h, w) to (1, 3, 4 h, 4 w), in 0..1."""


def read_photos(folder: Path) -> dict[str, np.ndarray]:
    """(H, W, 3) uint8 of the held-out photographs by name, memory-mapped."""
    found = {p.stem: np.load(p, mmap_mode="r") for p in sorted((folder / "test").glob("*.npy"))}
    if not found:
        raise SystemExit(f"expected photographs in {folder / 'test'}, see training.photos")
    return found


def to_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) in 0..1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 to 8 bits."""
    levels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.numpy())


def centre(photo: np.ndarray, crop: int) -> Tensor:
    """The middle of a photograph, at most crop × crop px, as (1, 3, H, W) in 0..1."""
    size = [min(side, crop) // LR_SCALE * LR_SCALE for side in photo.shape[:2]]
    top, left = ((whole - part) // 2 for whole, part in zip(photo.shape[:2], size, strict=True))
    return to_tensor(photo[top : top + size[0], left : left + size[1]])


def degrade(original: Tensor, degradation: str, name: str) -> Tensor:
    """The (1, 3, H/4, W/4) input made of an original; the name seeds what is random."""
    signed = original * 2 - 1
    if degradation == "bicubic":
        return (reduce_bicubic(signed) + 1) / 2
    return (reduce_realistic(signed, np.random.default_rng(zlib.crc32(name.encode()))) + 1) / 2


def bicubic(lr: Tensor) -> Tensor:
    """Enlarge by 4 with bicubic interpolation."""
    return F.interpolate(lr, scale_factor=LR_SCALE, mode="bicubic", antialias=True).clamp(0, 1)


def model_condition(model: InfDiT, lr: Tensor) -> Condition:
    """The condition for a (B, 3, h, w) in [-1, 1], with the picture of the prior, if any."""
    weight = model.final.linear.weight
    cond = condition(lr)
    if model.prior is not None:
        with torch.no_grad():
            model.prior.add_to(cond.concat, lr, weight.device, weight.dtype)
    return Condition(cond.concat.to(weight.device), cond.lr.to(weight.device))


def upscaler(model: InfDiT, **settings: Any) -> Upscaler:
    """Enlarge by 4 with the model; settings as of `infdit_core.upscale`."""

    def enlarge(lr: Tensor) -> Tensor:
        return upscale(lr.movedim(1, -1), LR_SCALE, model=model, **settings).movedim(-1, 1)

    return enlarge
