"""Low-resolution pictures as users have them: Real-ESRGAN's degradations (arXiv 2107.10833).

Blur, resize, noise and JPEG, twice, then a sinc filter that rings as over-sharpened pictures do;
ranges and probabilities are the paper's, and follow from one generator.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from kornia.filters import filter2d
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from infdit_core.network.config import LR_SCALE
from training.data import reduce_bicubic

Range = tuple[float, float]

DEGRADATIONS = ("bicubic", "realesrgan", "mixed")

JPEG_QUALITY = (30, 95)
GREY_NOISE = 0.4
SINC_BLUR = 0.1
FINAL_SINC = 0.8
KERNEL_SIDES_PX = range(7, 22, 2)


@dataclass(frozen=True)
class Stage:
    """Chances and ranges of one round of blur, resize and noise."""

    blur: float
    sigma_px: Range
    resize: tuple[float, float, float]
    """Chances of making larger, making smaller, keeping."""
    scale: Range
    gaussian_levels: Range
    """Standard deviation in 8-bit levels."""
    poisson_scale: Range


FIRST = Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
SECOND = Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))


def reduce_as(degradation: str, pictures: Tensor, generator: np.random.Generator) -> Tensor:
    """LR pictures by one of `DEGRADATIONS`; of a mixed batch the first half is reduced bicubic."""
    count = {"bicubic": len(pictures), "realesrgan": 0, "mixed": (len(pictures) + 1) // 2}
    bicubic, realistic = pictures.tensor_split([count[degradation]])
    parts = []
    if len(bicubic):
        parts.append(reduce_bicubic(bicubic))
    if len(realistic):
        parts.append(reduce_realistic(realistic, generator))
    return torch.cat(parts)


def reduce_realistic(pictures: Tensor, generator: np.random.Generator) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to (B, 3, H/4, W/4) in 8-bit levels, each picture in its own way."""
    unit = (pictures + 1) / 2
    reduced = torch.stack([_degrade(picture[None], generator)[0] for picture in unit])
    return (reduced.clamp(0, 1) * 255).round() / 127.5 - 1


def _degrade(picture: Tensor, generator: np.random.Generator) -> Tensor:
    _, _, full_height, full_width = picture.shape
    height, width = full_height // LR_SCALE, full_width // LR_SCALE
    picture = _stage(picture, FIRST, full_height, full_width, generator)
    picture = _stage(_jpeg(picture, generator), SECOND, height, width, generator)

    def finish(picture: Tensor) -> Tensor:
        picture = _resize(picture, height, width, generator)
        if generator.random() < FINAL_SINC:
            picture = _filter(picture, sinc_kernel(_side(generator), _cutoff(generator)))
        return picture

    if generator.random() < 0.5:
        return _jpeg(finish(picture), generator)
    return finish(_jpeg(picture, generator))


def _stage(
    picture: Tensor, stage: Stage, height: int, width: int, generator: np.random.Generator
) -> Tensor:
    """Blur, resize to height × width times a random scale, and noise."""
    if generator.random() < stage.blur:
        picture = _filter(picture, _blur_kernel(stage, generator))
    low, high = stage.scale
    larger, smaller, same = (1, high), (low, 1), (1, 1)
    scale = generator.uniform(*(larger, smaller, same)[generator.choice(3, p=stage.resize)])
    picture = _resize(picture, max(1, int(height * scale)), max(1, int(width * scale)), generator)
    return _noise(picture, stage, generator)


def _blur_kernel(stage: Stage, generator: np.random.Generator) -> Tensor:
    side = _side(generator)
    if generator.random() < SINC_BLUR:
        return sinc_kernel(side, _cutoff(generator, math.pi / 3 if side < 13 else math.pi / 5))
    isotropic = generator.random() < 0.69
    sigma = generator.uniform(*stage.sigma_px, size=2)
    if isotropic:
        sigma[1] = sigma[0]
    shape = generator.choice(["gaussian", "generalized", "plateau"], p=[0.7, 0.15, 0.15])
    beta = generator.uniform(
        *{"gaussian": (1, 1), "generalized": (0.5, 4), "plateau": (1, 2)}[shape]
    )
    return gaussian_kernel(
        side, tuple(sigma), generator.uniform(-math.pi, math.pi), beta, shape == "plateau"
    )


def gaussian_kernel(
    side: int, sigma_px: Range, angle: float, beta: float = 1.0, plateau: bool = False
) -> Tensor:
    """(side, side) kernel of sum 1: exp(-q^beta / 2), or 1 / (1 + q^beta) for a flat top.

    Args:
        sigma_px: widths along the two axes, which are turned by `angle` (radians); q is the squared
            distance in these units.
    """
    y, x = _offsets(side)
    along = (x * math.cos(angle) + y * math.sin(angle)) / sigma_px[0]
    across = (y * math.cos(angle) - x * math.sin(angle)) / sigma_px[1]
    power = (along.square() + across.square()) ** beta
    kernel = 1 / (1 + power) if plateau else torch.exp(-power / 2)
    return (kernel / kernel.sum()).float()


def sinc_kernel(side: int, cutoff: float) -> Tensor:
    """(side, side) kernel of sum 1: the ideal circular low-pass of `cutoff` radians per pixel."""
    radius = torch.hypot(*_offsets(side))
    ring = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel = torch.where(radius == 0, cutoff**2 / (4 * math.pi), ring)
    return (kernel / kernel.sum()).float()


def _offsets(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _side(generator: np.random.Generator) -> int:
    return int(generator.choice(KERNEL_SIDES_PX))


def _cutoff(generator: np.random.Generator, lowest: float = math.pi / 3) -> float:
    return generator.uniform(lowest, math.pi)


def _filter(picture: Tensor, kernel: Tensor) -> Tensor:
    # reflection needs a picture wider than half the kernel; tiny intermediate ones repeat the edge
    fits = min(picture.shape[-2:]) > kernel.shape[-1] // 2
    return filter2d(picture, kernel[None], "reflect" if fits else "replicate")


def _resize(picture: Tensor, height: int, width: int, generator: np.random.Generator) -> Tensor:
    mode = generator.choice(["area", "bilinear", "bicubic"])
    return F.interpolate(picture, size=(height, width), mode=str(mode)).clamp(0, 1)


def _noise(picture: Tensor, stage: Stage, generator: np.random.Generator) -> Tensor:
    shape = list(picture.shape)
    grey = generator.random() < GREY_NOISE
    if generator.random() < 0.5:
        if grey:
            shape[1] = 1
        sigma = generator.uniform(*stage.gaussian_levels) / 255
        noise = torch.from_numpy(sigma * generator.standard_normal(shape))
    else:
        signal = picture.double()
        if grey:
            signal = signal.mean(dim=1, keepdim=True)
        photons = torch.from_numpy(generator.poisson(255 * signal.numpy()))
        noise = generator.uniform(*stage.poisson_scale) * (photons / 255 - signal)
    return (picture + noise.float()).clamp(0, 1)


def _jpeg(picture: Tensor, generator: np.random.Generator) -> Tensor:
    """Through a real encoder, with its chroma at half the resolution."""
    levels = (picture[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    file = io.BytesIO()
    quality = int(generator.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    Image.fromarray(levels.numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
