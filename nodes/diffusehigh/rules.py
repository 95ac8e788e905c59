"""DiffuseHigh's mathematics: wavelets, sharpening, sizes, strengths; nothing of ComfyUI.

Source: Kim et al., "DiffuseHigh", AAAI 2025 (arXiv 2406.18459), with the constants of the authors'
code. Pictures are (B, C, H, W), sizes (height, width).

The guidance swaps the low band LL of a picture x for that of another one. A wavelet transform is
linear, so with W, the inverse transform of LL alone, this is x + W(LL_other - LL(x)): the bands of
detail need not be computed, and a strength is a factor before W.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F

Size = tuple[int, int]
"""Height and width."""

_R2, _R3 = math.sqrt(2), math.sqrt(3)
WAVELETS: dict[str, tuple[float, ...]] = {
    "db4": (
        0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854,
        -0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032,
    ),
    "haar": (1 / _R2, 1 / _R2),
    "db2": tuple(x / (4 * _R2) for x in (1 + _R3, 3 + _R3, 3 - _R3, 1 - _R3)),
    "sym4": (
        0.0322231006040427, -0.012603967262037833, -0.09921954357684722, 0.29785779560527736,
        0.8037387518059161, 0.49761866763201545, -0.02963552764599851, -0.07576571478927333,
    ),
}  # fmt: skip
"""Taps of the synthesis low-pass filter; reversed, those of the analysis. Their sum is sqrt(2)."""


def most_levels(size: Size, wavelet: str) -> int:
    """How many levels a picture of this size has: each needs a filter length of pixels."""
    taps, n, levels = len(WAVELETS[wavelet]), min(size), 0
    while n >= taps:
        n, levels = (n + taps - 1) // 2, levels + 1
    return levels


def low_band(x: torch.Tensor, wavelet: str, levels: int) -> torch.Tensor:
    """The low band of `x` (B, C, H, W) after `levels` levels, mirrored at the borders."""
    for _ in range(levels):
        x = _analysis(_analysis(x, -1, wavelet), -2, wavelet)
    return x


def from_low_band(low: torch.Tensor, size: Size, wavelet: str, levels: int) -> torch.Tensor:
    """The picture (B, C, *size) that has this low band and no detail: W of this module's text."""
    sizes, taps = [size], len(WAVELETS[wavelet])
    for _ in range(levels - 1):
        h, w = sizes[-1]
        sizes.append(((h + taps - 1) // 2, (w + taps - 1) // 2))
    for h, w in reversed(sizes):
        low = _synthesis(_synthesis(low, -2, h, wavelet), -1, w, wavelet)
    return low


def swap_low_band(
    x: torch.Tensor, low: torch.Tensor, wavelet: str, levels: int, strength: float = 1.0
) -> torch.Tensor:
    """`x` (B, C, H, W) with the low band `low` in place of its own; strength 0 changes nothing."""
    change = low - low_band(x, wavelet, levels)
    size = x.shape[-2], x.shape[-1]
    return x + strength * from_low_band(change, size, wavelet, levels)


def _analysis(x: torch.Tensor, dim: int, wavelet: str) -> torch.Tensor:
    """Low-pass and every second value along one axis: n to (n + taps - 1) // 2 values.

    Sums of slices and no convolution, which a GPU would compute in TF32.
    """
    g, n = WAVELETS[wavelet], x.shape[dim]
    count = (n + len(g) - 1) // 2
    at = torch.arange(2 - len(g), 2 * count, device=x.device) % (2 * n)
    x = x.index_select(dim, torch.minimum(at, 2 * n - 1 - at))  # ... x1 x0 | x0 x1 ...
    x = x.movedim(dim, -1)
    low = sum(tap * x[..., j : j + 2 * count - 1 : 2] for j, tap in enumerate(g))
    return torch.as_tensor(low).movedim(-1, dim)


def _synthesis(low: torch.Tensor, dim: int, n: int, wavelet: str) -> torch.Tensor:
    """The inverse along one axis, cut to `n` values."""
    g, low = WAVELETS[wavelet], low.movedim(dim, -1)
    half, pairs = len(g) // 2, (n + 1) // 2
    shifted = [low[..., half - 1 - j : half - 1 - j + pairs] for j in range(half)]
    even, odd = (
        torch.as_tensor(sum(g[2 * j + r] * part for j, part in enumerate(shifted))) for r in (0, 1)
    )
    return torch.stack([even, odd], -1).flatten(-2)[..., :n].movedim(-1, dim)


def enlarge(x: torch.Tensor, size: Size) -> torch.Tensor:
    """`x` (B, C, H, W) in another size by bicubic interpolation, not clamped."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bicubic", align_corners=False)


def sharpen(x: torch.Tensor, alpha: float, kernel: int, sigma: float) -> torch.Tensor:
    """`x` (B, C, H, W) plus `alpha` times what a Gaussian blur takes from it; not clamped.

    kernel: taps of the blur along each axis, odd, at most 2·min(H, W) - 1. sigma: in pixels.
    """
    if alpha == 0:
        return x
    reach = kernel // 2
    taps = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    blurred = F.pad(x, (reach,) * 4, mode="reflect")
    for dim in (-1, -2):
        n = blurred.shape[dim] - 2 * reach
        parts = (tap / sum(taps) * blurred.narrow(dim, j, n) for j, tap in enumerate(taps))
        blurred = torch.as_tensor(sum(parts))
    return (1 + alpha) * x - alpha * blurred


def blur_sigma(seed: int, stage: int, low: float, high: float) -> float:
    """The blur of one stage, drawn between `low` and `high` pixels without global random state."""
    generator = torch.Generator().manual_seed((seed * 1000 + stage) % 2**63)
    return low + (high - low) * float(torch.rand((), generator=generator))


def strengths(count: int, strength: float, fade: float) -> list[float]:
    """The strength of the guidance in each of its `count` steps."""
    return [strength * (1 - fade * i / count) for i in range(count)]


LARGEST_SCALE = 4
"""Of a stage, against the picture that comes in."""


def stage_sizes(scales: str, size: Size, multiple: int) -> list[Size]:
    """The sizes of the stages for a picture of `size`, rounded to multiples of `multiple` px.

    scales: such as "1.5, 2.0", factors of both sides, or "1536x1024, 2048x1360", width x height.
    ValueError unless they are larger than the picture, at most 4 times its sides, and rise.
    """
    expected = (
        f"expected factors above 1 and up to {LARGEST_SCALE}, or sizes such as 1536x1024, each"
        f" larger than the one before, for a picture of {size[1]}x{size[0]} px"
    )
    sizes: list[Size] = []
    for word in filter(None, re.split(r"[,;\s]+", scales.strip())):
        if match := re.fullmatch(r"(\d+)[xX×](\d+)", word):
            wanted = int(match[2]), int(match[1])
        elif re.fullmatch(r"\d+(\.\d*)?|\.\d+", word):
            wanted = float(word) * size[0], float(word) * size[1]
        else:
            raise ValueError(f"{expected}; got {word!r}")
        h, w = (max(1, int(n / multiple + 0.5)) * multiple for n in wanted)
        last = sizes[-1] if sizes else size
        rises = h >= last[0] and w >= last[1] and (h, w) != last
        if not rises or max(wanted[0] / size[0], wanted[1] / size[1]) > LARGEST_SCALE:
            raise ValueError(f"{expected}; got {word!r}, in multiples of {multiple} px {w}x{h}")
        sizes.append((h, w))
    if not sizes:
        raise ValueError(f"{expected}; got none")
    return sizes
