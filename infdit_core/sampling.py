"""Solvers of the EDM probability flow ODE (Karras et al., arXiv 2206.00364).

Every solver has the signature `solver(denoise, x, sigmas, callback)`, where `denoise(x, sigma)`
returns D(x; sigma), and reports each step through `callback` before it takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .condition import Condition
from .edm import RHO, partial_sigmas
from .model import InfDiT, Progress
from .residual_cache import ResidualCache
from .schedule import Full, Schedule

Denoise = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """What a solver reports when it has denoised the picture of a step."""

    index: int
    """0 for the first step."""
    total: int
    sigma: float
    x: Tensor
    """(B, 3, H, W), the noisy picture of this step."""
    denoised: Tensor
    """(B, 3, H, W), D(x; sigma)."""


Callback = Callable[[Step], None]
Solver = Callable[[Denoise, Tensor, list[float], Callback], Tensor]


def to_d(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dsigma of the probability flow ODE."""
    return (x - denoised) / sigma


def euler(denoise: Denoise, x: Tensor, sigmas: list[float], callback: Callback) -> Tensor:
    """Euler's method: one evaluation a step."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        x = x + (following - sigma) * to_d(x, sigma, denoised)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: list[float], callback: Callback) -> Tensor:
    """Heun's method (algorithm 1): two evaluations a step, one for the last step to 0."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        d = to_d(x, sigma, denoised)
        predicted = x + (following - sigma) * d
        if following > 0:
            d = (d + to_d(predicted, following, denoise(predicted, following))) / 2
            predicted = x + (following - sigma) * d
        x = predicted
    return x


THIRD_ORDER_STEPS = 10
"""With fewer steps over the whole range the third order overshoots (benchmarks/solvers.py)."""


def multistep(denoise: Denoise, x: Tensor, sigmas: list[float], callback: Callback) -> Tensor:
    """Exponential multistep in log sigma: one evaluation a step.

    D of the last steps is interpolated by a polynomial in lambda = -log sigma, under which the ODE
    is integrated exactly over the next step: Adams-Bashforth for data prediction, like
    DPM-Solver++ (Lu et al., arXiv 2211.01095), of second order for long steps and else of third.
    """
    order = 3 if len(sigmas) > THIRD_ORDER_STEPS else 2
    history: list[Tensor] = []
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        if following == 0:
            return denoised  # the limit, whatever D was before
        history = [denoised, *history][:order]
        nodes = [sigmas[i - j] for j in range(len(history))]
        x = following / sigma * x
        for weight, d in zip(_exponential_weights(nodes, following), history, strict=True):
            x = x + weight * d
    return x


def _exponential_weights(nodes: list[float], end: float) -> list[float]:
    """Of D at the sigmas `nodes`, newest first, for the step from nodes[0] to end.

    x(end) = end / start · x(start) + end · ∫ exp(lambda) D(lambda) dlambda, with the polynomial
    through the values of D: the weights reproduce the integrals of its powers.
    """
    start = nodes[0]
    step = math.log(start / end)
    moments = [-math.expm1(-step)]
    for power in range(1, len(nodes)):
        moments.append(step**power - power * moments[-1])
    powers = np.vander([math.log(start / node) for node in nodes], increasing=True).T
    return np.linalg.solve(powers, moments).tolist()


class Preset(NamedTuple):
    """A solver and its number of steps."""

    solver: str
    steps: int

    @property
    def evaluations(self) -> int:
        """Of the network: Heun's method takes two a step, but for the last."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def sigmas(self, denoise: float = 1.0) -> Tensor:
        """The noise levels that suit the solver, as from `partial_sigmas`."""
        return partial_sigmas(self.steps, denoise, math.inf if self.solver == "multistep" else RHO)


PRESETS = {
    "exact": Preset("heun", 20),
    "fast": Preset("multistep", 12),
    "draft": Preset("multistep", 6),
}
"""What the release does, its error with a third of the evaluations, and a first look
(benchmarks/results/solvers.json)."""

SOLVERS: dict[str, Solver] = {"heun": heun, "euler": euler, "multistep": multistep}


@torch.no_grad()
def sample(
    model: InfDiT,
    cond: Condition,
    sigmas: Tensor,
    *,
    noise: Tensor,
    solver: str = "heun",
    schedule: Schedule | None = None,
    callback: Callback | None = None,
    progress: Progress | None = None,
    cache: ResidualCache | None = None,
) -> Tensor:
    """Draw a picture: start from the LR picture plus noise and follow the ODE to sigma 0.

    Args:
        model: the network.
        cond: the condition, on any device.
        sigmas: (n + 1,) falling noise levels that end in 0, as from `edm_sigmas`.
        noise: (B, 3, H, W) unit Gaussian.
        solver: a name in `SOLVERS`.
        schedule: the order of computation in the network.
        callback: called with a `Step` once in every step; may raise to cancel.
        progress: called after every chunk of every layer of an evaluation; may raise to cancel.
        cache: a new one, to leave out layers where sigma has hardly changed; exact if None.

    Returns:
        (B, 3, H, W) float32, about [-1, 1], not clipped.

    Raises:
        ValueError: the solver is unknown, or the sigmas do not fall.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}, expected one of {', '.join(SOLVERS)}")
    levels = [float(s) for s in sigmas]
    if len(levels) < 2 or not all(b < a for a, b in pairwise(levels)):
        raise ValueError(f"expected at least two falling sigmas, got {levels}")
    if levels[-1] < 0:
        raise ValueError(f"expected sigmas of at least 0, got {levels[-1]}")
    schedule = schedule or Full()
    weight = model.final.linear.weight
    concat = cond.concat.to(schedule.pictures_device or weight.device, torch.float32)
    lr_kv = model.lr_keys_values(cond.lr.to(weight)) if schedule.keep_lr else None

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return model.denoise(x, sigma, cond, schedule, lr_kv=lr_kv, progress=progress, cache=cache)

    x = concat + levels[0] * noise.to(concat)
    return SOLVERS[solver](denoise, x, levels, callback or (lambda step: None))
