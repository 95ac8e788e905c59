"""What Upsample Guidance computes: torch, nothing of ComfyUI.

Source: Hwang, Park, Jo, "Upsample Guidance" (arXiv 2404.01709). With x = x0 + sigma * noise, a mean
over m×m pixels has noise of sigma / m, so the model can denoise it at its native size:

    x0' = x0(x, sigma) + w * U(x0(D x, sigma / m) - D x0(x, sigma))

D is the mean over m×m pixels, U repeats every pixel m×m times. Sizes are in latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Size = tuple[int, int]
"""Height and width in latent pixels."""
Control = dict[str, list[torch.Tensor | None]]
"""Residuals of a ControlNet by the part of the UNet that takes them."""

SCALES = (2, 3, 4)
"""The m that a run may have; 1 is no guidance."""
STEPS = 1000
"""Training timesteps, numbered from 0 at the least noise."""


@dataclass(frozen=True)
class Window:
    """How strong the guidance is at a training timestep."""

    theta: float
    eta: float
    """The part of the timesteps that is guided, from the noisiest on."""
    ramp: float
    """The part of those over which the strength falls to 0; 0: a step, as the authors do."""

    @property
    def closed(self) -> bool:
        """Whether no timestep is guided."""
        return self.theta == 0 or self.eta == 0

    def weight(self, timestep: float) -> float:
        """w: theta strictly above (1 - eta) * 1000, and 0 from there on."""
        inside = timestep - round(STEPS * (1 - self.eta), 6)
        fall = STEPS * self.eta * self.ramp
        if inside <= 0:
            return 0.0
        return self.theta * min(inside / fall, 1.0) if fall else self.theta


def auto_scale(size: Size, native: int) -> int:
    """The m that brings a latent nearest to a square of `native`: 1 to 4."""
    return min(max(int(math.sqrt(size[0] * size[1]) / native + 0.5), 1), SCALES[-1])


@dataclass(frozen=True)
class Guided:
    """The part of a latent that divides by m, in its middle. The rest stays unguided.

    Its rows are not filled up with copies: those share their noise, which a mean does not reduce.
    """

    size: Size
    """Of the whole latent."""
    m: int

    @property
    def low(self) -> Size:
        """Size of the guided part's means."""
        return self.size[0] // self.m, self.size[1] // self.m

    @property
    def _margins(self) -> tuple[int, int, int, int]:
        """Unguided pixels left, right, above, below: the order of F.pad."""
        (top, bottom), (left, right) = (
            (n % self.m // 2, n % self.m - n % self.m // 2) for n in self.size
        )
        return left, right, top, bottom

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, [-margin for margin in self._margins])

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """D: (B, C, H, W) to (B, C, H // m, W // m)."""
        return F.avg_pool2d(self._cut(x), self.m)

    def enlarge(self, x: torch.Tensor) -> torch.Tensor:
        """U: (B, C, H // m, W // m) to (B, C, H, W), 0 in the unguided rows and columns."""
        return F.pad(F.interpolate(x, scale_factor=self.m, mode="nearest"), self._margins)

    def guide(self, high: torch.Tensor, low: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x0' of x0 at full size (B, C, H, W) and at the low one; weight (B, 1, 1, 1)."""
        return high + weight * self.enlarge(low - self.mean(high))

    def concat(self, x: torch.Tensor, masks: int) -> torch.Tensor:
        """Channels that the UNet gets beside the latent, the first `masks` of which are masks."""
        low = self.mean(x)
        if masks:  # one pixel of every m×m: the UNet has seen no mask but 0 and 1
            low[:, :masks] = F.interpolate(self._cut(x[:, :masks]), self.low, mode="nearest")
        return low

    def control(self, control: Control | None) -> Control | None:
        """Residuals in the sizes of the low call's features; `control` stays as it is.

        ComfyUI drops a residual of another size and only logs it.
        """
        if control is None:
            return None
        sizes = dict(zip(_feature_sizes(self.size), _feature_sizes(self.low), strict=False))

        def fit(residual: torch.Tensor | None) -> torch.Tensor | None:
            if residual is None:
                return None
            h, w = residual.shape[-2:]
            size = sizes.get((h, w))
            return F.interpolate(residual, size, mode="bicubic") if size else residual

        return {name: [fit(residual) for residual in part] for name, part in control.items()}


def _feature_sizes(size: Size) -> Iterator[Size]:
    """Sizes of a UNet's features, level by level: each is half of the one before, rounded up."""
    for _ in range(8):
        yield size
        size = -(-size[0] // 2), -(-size[1] // 2)


_SINUSOID = 256
"""Numbers in which SDXL is told one length."""


def divide_lengths(y: torch.Tensor, told: int, lengths: int, m: int) -> torch.Tensor:
    """SDXL's vector (B, C) with the picture's lengths divided by m.

    Its last `told` numbers are sinusoids of 256, the first `lengths` of them of lengths in whole
    pixels: heights, widths and crops. They are read back from their slowest pair, which does not
    come round below 29 000 px.
    """
    first = y.shape[1] - told * _SINUSOID
    part = slice(first, first + lengths * _SINUSOID)
    half = torch.arange(_SINUSOID // 2, device=y.device, dtype=torch.float32)
    speeds = torch.exp(-math.log(10000) * half / len(half))
    cos, sin = y[:, part].float().unflatten(1, (lengths, 2, -1)).unbind(2)  # (B, lengths, 128)
    pixels = torch.round(torch.atan2(sin[..., -1], cos[..., -1]) / speeds[-1])
    angles = (pixels / m)[..., None] * speeds
    divided = y.clone()
    divided[:, part] = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
    return divided
