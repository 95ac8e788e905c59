"""EDM: preconditioning, noise levels and loss weight (Karras et al., arXiv 2206.00364).

`sigma` is the standard deviation of the noise on a picture in [-1, 1] scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SIGMA_DATA = 0.5
RESIDUAL_DATA = 0.1
"""The same for a picture minus its prior: photographs have 0.08 to 0.12."""
RESIDUAL_MAX = 0.5
"""Where sampling starts with a prior: five times what it leaves, which is hidden by then."""
SIGMA_MIN = 0.002
SIGMA_MAX = 40.0
RHO = 7.0


class Preconditioning(NamedTuple):
    """Factors of `D(x; sigma) = c_out · F(c_in · x, c_noise) + c_skip · x`, each like sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """The EDM factors of Table 1 for noise levels of any shape."""
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data * variance.rsqrt(),
        c_in=variance.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def edm_sigmas(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """(steps + 1,) falling noise levels, the last one 0 (equation 5).

    Equal steps in sigma^(1/rho); for rho = infinity the limit of that, equal steps in log sigma.

    Raises:
        ValueError: fewer than one step, or not 0 < sigma_min <= sigma_max.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"expected 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if math.isinf(rho):
        sigmas = sigma_max * (sigma_min / sigma_max) ** ramp
    else:
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def partial_sigmas(
    steps: int, denoise: float, rho: float = RHO, sigma_max: float = SIGMA_MAX
) -> Tensor:
    """Noise levels like `edm_sigmas(steps)` from a lower one on, to start from an upscaled picture.

    Args:
        steps: of the whole schedule.
        denoise: 0..1, the share of it that is left: 1 starts at `sigma_max`, 0.5 at 1.4 of 40,
            0.25 at 0.11, and 0 gives the single level 0, for no step at all.
        rho: spacing of the levels; where they start does not depend on it.
        sigma_max: where the whole schedule starts.

    Raises:
        ValueError: fewer than one step, or a share outside 0..1.
    """
    if not 0 <= denoise <= 1:
        raise ValueError(f"expected denoise in 0..1, got {denoise}")
    if denoise == 0:
        return torch.zeros(1)
    low, high = SIGMA_MIN ** (1 / RHO), sigma_max ** (1 / RHO)
    start = (low + denoise * (high - low)) ** RHO
    first = start if denoise < 1 else sigma_max
    return edm_sigmas(max(1, round(steps * denoise)), sigma_max=first, rho=rho)
