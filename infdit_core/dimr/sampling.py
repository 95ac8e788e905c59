"""The authors' noise schedule and solver: singlestep DPM-Solver++ on a grid uniform in time.

Latents are in the scale of k-diffusion, x = z + sigma · noise; the authors have
x / sqrt(1 + sigma²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import InfDiTError
from .config import NULL_CLASS
from .model import DiMR

STEPS = 1000
"""Knots of the noise schedule; at the last but 999 sampling ends."""
EVALUATIONS = 250
"""What the authors sample with."""
CFG_SCALE = 1.4
"""Theirs; they write it as cond + 0.4 (cond - uncond)."""
LATENT_SCALE = 0.18215
"""What the latents of SD 1.5's autoencoder are multiplied with."""

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
"""Called with the evaluations done before this one, x and its denoised."""


@cache
def _log_alphas() -> np.ndarray:
    """(STEPS,) log alpha at t = 1/STEPS, 2/STEPS, ..., 1; betas are SD 1.5's."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    return np.cumsum(np.log1p(-betas)) / 2


def sigma_of(t: Tensor) -> Tensor:
    """Noise levels of times in [1/1000, 1], any shape; log alpha is linear between the knots."""
    knots = np.arange(1, STEPS + 1) / STEPS
    log_alpha = np.interp(t.double().cpu().numpy(), knots, _log_alphas())
    return torch.from_numpy(np.asarray(np.sqrt(np.expm1(-2 * log_alpha)))).to(t)


def timestep_of(sigma: Tensor) -> Tensor:
    """1000 t - 1 of noise levels of any shape, which is the knots' index with fractions.

    Levels outside of the schedule get its ends.
    """
    log_alpha = -np.log1p(sigma.double().cpu().numpy() ** 2) / 2
    # np.interp wants rising positions
    index = np.interp(log_alpha, _log_alphas()[::-1], np.arange(STEPS)[::-1])
    return torch.from_numpy(np.asarray(index)).to(sigma)


def time_of(sigma: Tensor) -> Tensor:
    """The inverse of `sigma_of`; levels outside of the schedule get its ends."""
    # By way of the timestep, as in ComfyUI, whose models get nothing else: the same bits
    return (timestep_of(sigma) + 1) / STEPS


def uniform_sigmas(evaluations: int = EVALUATIONS) -> Tensor:
    """(evaluations + 1,) falling noise levels, uniform in time from 1 to 1/1000; none is 0.

    Raises:
        InfDiTError: not 1 to 1000 evaluations.
    """
    if not 1 <= evaluations <= STEPS:
        raise InfDiTError(f"expected 1 to {STEPS} evaluations, got {evaluations}")
    t = torch.linspace(1, 1 / STEPS, evaluations + 1, dtype=torch.float64)
    return sigma_of(t).float()


def orders(evaluations: int) -> list[int]:
    """Evaluations of each step: 3 as long as they last, at the end 2 or 1."""
    full, rest = divmod(evaluations, 3)
    return [3] * (full - 1) + [2, 1] if rest == 0 else [3] * full + [rest]


def _towards(x: Tensor, denoised: Tensor, sigma: float, following: float) -> Tensor:
    """x at the next level if D stays what it is."""
    return torch.lerp(denoised, x, following / sigma)


def singlestep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """Singlestep DPM-Solver++ of order 3 with all evaluations on the grid (Lu et al., 2211.01095).

    Args:
        denoise: gives D(x; sigma).
        x: (B, C, H, W) at sigmas[0].
        sigmas: (n + 1,) falling, n evaluations.

    Returns:
        x at sigmas[-1].
    """
    levels = sigmas.tolist()
    done = 0

    def evaluate(x: Tensor) -> Tensor:
        nonlocal done
        denoised = denoise(x, levels[done])
        if callback is not None:
            callback(done, x, denoised)
        done += 1
        return denoised

    for order in orders(len(levels) - 1):
        start, between, end = levels[done], levels[done + 1 : done + order], levels[done + order]
        if end == 0:  # lambda is infinite there: what is left is a step to D
            for _ in range(order):
                x = _towards(x, evaluate(x), levels[done - 1], levels[done])
            return x
        h = math.log(start / end)  # of lambda = -log sigma
        at_start = evaluate(x)
        first_order = _towards(x, at_start, start, end)
        phi = math.expm1(-h)
        if order == 1:
            x = first_order
            continue
        r1 = math.log(start / between[0]) / h
        slope = evaluate(_towards(x, at_start, start, between[0])) - at_start
        if order == 2:
            x = first_order - phi / (2 * r1) * slope
            continue
        r2 = math.log(start / between[1]) / h
        phi2 = math.expm1(-r2 * h)
        x2 = _towards(x, at_start, start, between[1]) + r2 / r1 * (phi2 / (r2 * h) + 1) * slope
        slope = evaluate(x2) - at_start
        x = first_order + (phi / h + 1) / r2 * slope
    return x


def cfg_decay(t: float, scale: float, exponent: float) -> float:
    """CFG scale at time t: 1 where sampling starts, `scale` where it ends (as DiT's authors do)."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - t) ** exponent)) / 2


@torch.no_grad()
def sample(
    model: DiMR,
    noise: Tensor,
    classes: Tensor,
    *,
    evaluations: int = EVALUATIONS,
    cfg_scale: float = CFG_SCALE,
    exponent: float | None = None,
    dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Draw latents (B, C, H, W) of the classes, float32, as SD 1.5's VAE takes them times 0.18215.

    Args:
        noise: (B, C, H, W) unit Gaussian, float32.
        classes: (B,) integers.
        cfg_scale: 1 for no guidance.
        exponent: of `cfg_decay`; None for the same scale at all times.
        dtype: of the computation.
        callback: may raise to cancel.
    """
    sigmas = uniform_sigmas(evaluations).to(noise.device)
    null = torch.full_like(classes, NULL_CLASS)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        # float32 throughout, as k-diffusion has it: the same bits in ComfyUI
        level = torch.full((len(x), 1, 1, 1), sigma, dtype=torch.float32, device=x.device)
        t = time_of(level.flatten())
        scaled = (x / (level**2 + 1).sqrt()).to(dtype)
        cond = x - model(scaled, t, classes) * level
        scale = cfg_scale if exponent is None else cfg_decay(t[0].item(), cfg_scale, exponent)
        if scale == 1:
            return cond
        uncond = x - model(scaled, t, null) * level
        return uncond + (cond - uncond) * scale

    x = noise * (1 + sigmas[0] ** 2).sqrt()
    return finished(singlestep(denoise, x, sigmas, callback), sigmas[-1])


def finished(x: Tensor, sigma: Tensor) -> Tensor:
    """The latent in the authors' scale, which they decode although some noise is left in it."""
    return x / (1 + sigma**2).sqrt()
