"""Real-ESRGAN's degradations (arXiv 2107.10833) for batches on a GPU, in plain tensor operations.

Like `degrade.py`, which is the reference and goes picture by picture. Here blur, noise and JPEG
differ for every picture; sizes and ways of resizing are shared by a batch: call it with small ones.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infdit_core.network.config import LR_SCALE

KERNEL_PX = 21
JPEG_QUALITY = (30, 95)


def reduce_realistic_batch(
    pictures: Tensor, generator: np.random.Generator, group: int = 16
) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to (B, 3, H/4, W/4) in 8-bit levels; sizes shared by `group`s."""
    parts = [_degrade((part + 1) / 2, generator) for part in pictures.split(group)]
    return (torch.cat(parts).clamp(0, 1) * 255).round() / 127.5 - 1


def _degrade(x: Tensor, generator: np.random.Generator) -> Tensor:
    height, width = x.shape[-2:]
    x = _blur(x, 1.0, (0.2, 3.0), generator)
    x = _scale(x, (height, width), (0.2, 0.7, 0.1), (0.15, 1.5), generator)
    x = jpeg(_noise(x, (1, 30), (0.05, 3.0), generator), _qualities(x, generator))
    height, width = height // LR_SCALE, width // LR_SCALE
    x = _blur(x, 0.8, (0.2, 1.5), generator)
    x = _scale(x, (height, width), (0.3, 0.4, 0.3), (0.3, 1.2), generator)
    x = _noise(x, (1, 25), (0.05, 2.5), generator)
    jpeg_last = generator.random() < 0.5
    if not jpeg_last:
        x = jpeg(x, _qualities(x, generator))
    x = _resize(x, (height, width), generator)
    cutoff = _uniform(x, (math.pi / 3, math.pi), generator)
    x = _filter(x, _mostly(_sinc(cutoff), 0.8, generator))
    return jpeg(x, _qualities(x, generator)) if jpeg_last else x


def _uniform(x: Tensor, bounds: tuple[float, float], generator: np.random.Generator) -> Tensor:
    """(B,) random values, one for each picture of x."""
    return torch.from_numpy(generator.uniform(*bounds, size=len(x))).float().to(x.device)


def _qualities(x: Tensor, generator: np.random.Generator) -> Tensor:
    return _uniform(x, JPEG_QUALITY, generator)


@lru_cache
def _offsets(device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(KERNEL_PX, dtype=torch.float32, device=device) - KERNEL_PX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _sinc(cutoff: Tensor) -> Tensor:
    """(B, k, k) ideal circular low-passes of cutoffs (B,) in radians per pixel."""
    y, x = _offsets(cutoff.device)
    radius = torch.hypot(x, y).clamp(min=1e-4)
    cutoff = cutoff[:, None, None]
    # J1 exists for GPUs, but not in every build; its integral in 64 steps is exact here
    turn = (torch.arange(64, device=cutoff.device) + 0.5) * (math.pi / 64)
    argument = (cutoff * radius)[..., None]
    bessel = (turn - argument * turn.sin()).cos().mean(-1)
    kernel = cutoff * bessel / radius
    return kernel / kernel.sum((-2, -1), keepdim=True)


def _gaussian(x: Tensor, sigma_px: tuple[float, float], generator: np.random.Generator) -> Tensor:
    """(B, k, k) Gaussian, generalised and flat-topped kernels, round or turned."""
    rows, columns = _offsets(x.device)
    count = len(x)
    sigma = generator.uniform(*sigma_px, size=(2, count))
    sigma[1] = np.where(generator.random(count) < 0.69, sigma[0], sigma[1])
    angle = generator.uniform(-math.pi, math.pi, size=count)
    kind = generator.choice(3, size=count, p=[0.7, 0.15, 0.15])
    beta = np.select(
        [kind == 1, kind == 2],
        [generator.uniform(0.5, 4, count), generator.uniform(1, 2, count)],
        1.0,
    )
    values = np.stack([sigma[0], sigma[1], np.cos(angle), np.sin(angle), beta, kind == 2])
    along_px, across_px, cos, sin, power, flat = (
        torch.from_numpy(values).float().to(x.device)[:, :, None, None].unbind(0)
    )
    along = (columns * cos + rows * sin) / along_px
    across = (rows * cos - columns * sin) / across_px
    q = (along.square() + across.square()).clamp(min=1e-8) ** power
    kernel = torch.where(flat > 0, 1 / (1 + q), torch.exp(-q / 2))
    return kernel / kernel.sum((-2, -1), keepdim=True)


def _mostly(kernel: Tensor, chance: float, generator: np.random.Generator) -> Tensor:
    """The kernels, but for some of the pictures one that changes nothing."""
    kept = torch.from_numpy(generator.random(len(kernel)) < chance).to(kernel.device)
    identity = torch.zeros_like(kernel)
    identity[:, KERNEL_PX // 2, KERNEL_PX // 2] = 1
    return torch.where(kept[:, None, None], kernel, identity)


def _blur(
    x: Tensor, chance: float, sigma_px: tuple[float, float], generator: np.random.Generator
) -> Tensor:
    kernel = _gaussian(x, sigma_px, generator)
    sinc = torch.from_numpy(generator.random(len(x)) < 0.1).to(x.device)
    cutoff = _uniform(x, (math.pi / 4, math.pi), generator)
    kernel = torch.where(sinc[:, None, None], _sinc(cutoff), kernel)
    return _filter(x, _mostly(kernel, chance, generator))


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Each picture (B, 3, H, W) with its own kernel (B, k, k)."""
    pad = KERNEL_PX // 2
    padded = F.pad(x, (pad,) * 4, mode="reflect" if min(x.shape[-2:]) > pad else "replicate")
    b, c, h, w = padded.shape
    weight = kernel.repeat_interleave(c, 0)[:, None]
    # no search for the fastest kernel: nearly every size is new
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    filtered = F.conv2d(padded.reshape(1, b * c, h, w), weight, groups=b * c)
    torch.backends.cudnn.benchmark = searching
    return filtered.view_as(x)


def _scale(
    x: Tensor,
    size: tuple[int, int],
    chances: tuple[float, float, float],
    bounds: tuple[float, float],
    generator: np.random.Generator,
) -> Tensor:
    """Resize to `size` times a random scale: larger, smaller or 1 by these chances."""
    ranges = (1, bounds[1]), (bounds[0], 1), (1, 1)
    scale = generator.uniform(*ranges[generator.choice(3, p=chances)])
    return _resize(x, (max(1, int(size[0] * scale)), max(1, int(size[1] * scale))), generator)


def _resize(x: Tensor, size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    mode = str(generator.choice(["area", "bilinear", "bicubic"]))
    return F.interpolate(x, size=size, mode=mode).clamp(0, 1)


def _noise(
    x: Tensor,
    levels: tuple[float, float],
    scales: tuple[float, float],
    generator: np.random.Generator,
) -> Tensor:
    """Gaussian noise on half of the pictures, of photons on the others; grey on 40 %."""
    grey = torch.from_numpy(generator.random(len(x)) < 0.4).to(x.device)[:, None, None, None]
    gaussian = torch.from_numpy(generator.random(len(x)) < 0.5).to(x.device)[:, None, None, None]

    def one_for_all(values: Tensor) -> Tensor:
        return torch.where(grey, values[:, :1], values)

    sigma = _uniform(x, levels, generator)[:, None, None, None] / 255
    strength = _uniform(x, scales, generator)[:, None, None, None]
    signal = torch.where(grey, x.mean(1, keepdim=True), x)
    photons = one_for_all(torch.poisson(signal * 255)) / 255 - signal
    normal = one_for_all(torch.randn_like(x)) * sigma
    return (x + torch.where(gaussian, normal, strength * photons)).clamp(0, 1)


_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99),
)  # fmt: skip
"""Tables of annex K of the standard; the rest of the one for colours is 99."""


@lru_cache
def _jpeg_constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = torch.arange(8, dtype=torch.float32)
    dct = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    chroma = torch.full((8, 8), 99.0)
    chroma[:4, :4] = torch.tensor(_CHROMA, dtype=torch.float32)
    colours = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    luma = torch.tensor(_LUMA, dtype=torch.float32)
    return dct.to(device), luma.to(device), chroma.to(device), colours.to(device)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 through JPEG of qualities (B,), colours at half the size."""
    dct, luma, chroma, colours = _jpeg_constants(x.device)
    height, width = x.shape[-2:]
    levels = (x.clamp(0, 1) * 255).round()
    levels = F.pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
    y, cb, cr = torch.einsum("kc,bchw->kbhw", colours, levels).round()
    scales = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None]

    def coded(plane: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        """(B, H, W) -> the same, through quantised coefficients of 8×8 squares."""
        steps = ((table * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]
        b, h, w = plane.shape
        squares = plane.view(b, h // 8, 8, w // 8, 8).transpose(2, 3)  # (B, rows, columns, 8, 8)
        coefficients = dct @ squares @ dct.T
        squares = dct.T @ ((coefficients / steps).round() * steps) @ dct
        return squares.transpose(2, 3).reshape(b, h, w).round().clamp(-128, 127)

    luminance = coded(y - 128, luma, scales) + 128
    half = F.avg_pool2d(torch.cat([cb, cr])[:, None], 2)[:, 0].round()
    half = coded(half, chroma, torch.cat([scales, scales]))
    cb, cr = F.interpolate(half[:, None], scale_factor=2, mode="bilinear")[:, 0].chunk(2)
    rgb = (
        luminance + 1.402 * cr,
        luminance - 0.344136 * cb - 0.714136 * cr,
        luminance + 1.772 * cb,
    )
    return (torch.stack(rgb, dim=1)[..., :height, :width].round() / 255).clamp(0, 1)
