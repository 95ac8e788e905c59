"""Solvers of the EDM probability flow ODE (Karras et al., arXiv 2206.00364).

Every solver has the signature `solver(denoise, x, sigmas, callback)`, where `denoise(x, sigma)`
returns D(x; sigma), and reports each step through `callback` before it takes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks.grid import Strip
from .blocks.schedules import Full, Schedule
from .edm import RHO, SIGMA_MAX, partial_sigmas
from .errors import InfDiTError
from .network.condition import Condition
from .network.model import InfDiT
from .network.residual_cache import ResidualCache
from .network.run import Progress, Run

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
Retry = Callable[[Callable[[Schedule], Tensor]], Tensor]
"""Calls an evaluation with a schedule, with another where that failed."""
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


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def multistep(denoise: Denoise, x: Tensor, sigmas: list[float], callback: Callback) -> Tensor:
    """Linear multistep: one evaluation a step, of four steps once they are there.

    Adams-Bashforth with the weights of equal steps whatever the sigmas are, as pseudo numerical
    methods do (iPNDM: Liu et al., arXiv 2202.09778, Zhang and Chen, arXiv 2204.13902). With equal
    steps in log sigma it was nearer to the solution than methods that integrate a polynomial in
    sigma or log sigma exactly (benchmarks/results/solvers_without_prior.json).
    """
    history: list[Tensor] = []
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        if following == 0:
            return denoised  # a long step in log sigma, which Euler's method takes exactly to D
        history = [to_d(x, sigma, denoised), *history][: len(_ADAMS_BASHFORTH)]
        weights = _ADAMS_BASHFORTH[len(history) - 1]
        for weight, d in zip(weights, history, strict=True):
            x = x + (following - sigma) * weight * d
    return x


class Preset(NamedTuple):
    """A solver and its number of steps."""

    solver: str
    steps: int
    shares: tuple[float, ...] = ()
    """Noise levels of the steps, of the first one; the schedule that suits the solver if empty."""
    consistency: int = 0
    """Back-projections of the result, as `Canvas.consistent` makes them."""

    @property
    def evaluations(self) -> int:
        """Of the network: Heun's method takes two a step, but for the last."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def sigmas(self, denoise: float = 1.0, sigma_max: float = SIGMA_MAX) -> Tensor:
        """The noise levels that suit the solver, as from `partial_sigmas`."""
        if self.shares:
            first = partial_sigmas(1, denoise, sigma_max=sigma_max)[0]
            return torch.tensor([*self.shares, 0.0]) * first if denoise else first[None]
        rho = math.inf if self.solver == "multistep" else RHO
        return partial_sigmas(self.steps, denoise, rho, sigma_max)


PRESETS = {
    "exact": Preset("heun", 20),
    "fast": Preset("multistep", 12),
    "draft": Preset("multistep", 6),
}
"""What the release does, its error with a third of the evaluations, and a first look
(benchmarks/results/solvers_without_prior.json)."""

SOLVERS: dict[str, Solver] = {"heun": heun, "euler": euler, "multistep": multistep}
AUTO = "auto"
"""Name of the preset that a model's file asks for."""
AUTO_KEY = "infdit.preset"
"""Its key in the file's metadata: JSON with solver, shares and consistency of a `Preset`."""


def find_preset(name: str, metadata: Mapping[str, str]) -> Preset:
    """One of `PRESETS`, or for `AUTO` what the metadata of a model's file asks for, else exact.

    Raises:
        InfDiTError: there is no such preset, or the metadata hold none that can be used.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name != AUTO:
        raise InfDiTError(f"unknown preset {name!r}, expected one of {', '.join([AUTO, *PRESETS])}")
    if AUTO_KEY not in metadata:
        return PRESETS["exact"]
    try:
        asked = json.loads(metadata[AUTO_KEY])
        shares = tuple(float(share) for share in asked["shares"])
        preset = Preset(asked["solver"], len(shares), shares, int(asked.get("consistency", 0)))
        check_sigmas(torch.tensor([*shares, 0.0]))
        if preset.solver not in SOLVERS or shares[0] != 1 or preset.consistency < 0:
            raise ValueError(preset)
    except (ValueError, TypeError, KeyError, InfDiTError) as error:
        raise InfDiTError(
            f"the model file's {AUTO_KEY} cannot be used: {metadata[AUTO_KEY][:200]!r}"
        ) from error
    return preset


def check_sigmas(sigmas: Tensor) -> list[float]:
    """Noise levels (n + 1,) as numbers.

    Raises:
        InfDiTError: they do not fall, one of them is below 0 or no number, or there is one alone.
    """
    levels = sigmas.flatten().tolist()
    falling = all(b < a for a, b in pairwise(levels))  # False with NaN
    if sigmas.ndim != 1 or len(levels) < 2 or not falling or math.isinf(levels[0]):
        found = ", ".join(f"{level:.4g}" for level in levels[:8]) or "none"
        more = ", ..." if len(levels) > 8 else ""
        raise InfDiTError(
            f"expected sigmas that fall, at least two; got {tuple(sigmas.shape)}: {found}{more}"
        )
    if levels[-1] < 0:
        raise InfDiTError(f"expected sigmas that end at 0 or above; got {levels[-1]}")
    return levels


@torch.no_grad()
def sample(
    model: InfDiT,
    cond: Condition,
    sigmas: Tensor,
    *,
    noise: Tensor,
    solver: str = "heun",
    schedule: Schedule | None = None,
    retry: Retry | None = None,
    callback: Callback | None = None,
    progress: Progress | None = None,
    cache: ResidualCache | None = None,
    start: Tensor | None = None,
    wrap: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    strip: Strip | None = None,
) -> Tensor:
    """Draw a picture: start from the LR picture plus noise and follow the ODE to sigma 0.

    Args:
        model: the network.
        cond: the condition, on any device.
        sigmas: (n + 1,) falling noise levels that end in 0, as from `edm_sigmas`.
        noise: (B, 3, H, W) unit Gaussian.
        solver: a name in `SOLVERS`.
        schedule: the order of computation in the network.
        retry: calls each evaluation with a schedule of its own choice, such as `Adaptive.call`,
            which takes a smaller one when memory runs out.
        callback: called with a `Step` once in every step; may raise to cancel.
        progress: called after every cell of an evaluation; may raise to cancel.
        cache: a new one, to leave out layers where sigma has hardly changed; exact if None.
        start: (B, 3, H, W) in [-1, 1], the picture to start from in place of the LR picture.
        wrap: fills margins of a (B, 3, H, W), before and after every evaluation.
        mask: (B, 1, H, W), 1 where the picture is drawn and 0 where it stays that of the start.
        strip: of a picture whose other strips are drawn elsewhere at the same time; all pictures
            here are of the strip, `cond.lr` of the whole.

    Returns:
        (B, 3, H, W) float32, about [-1, 1], not clipped.

    Raises:
        InfDiTError: the solver is unknown, or the sigmas do not fall.
    """
    if solver not in SOLVERS:
        raise InfDiTError(f"unknown solver {solver!r}, expected one of {', '.join(SOLVERS)}")
    levels = check_sigmas(sigmas)
    schedule = schedule or Full()
    run = Run(progress, cache)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        def evaluate(schedule: Schedule) -> Tensor:
            return model.denoise(x, sigma, cond, schedule, run=run, strip=strip)

        if mask is not None:
            x = torch.lerp(first + sigma * noise, x, mask)
        if wrap is not None:
            x = wrap(x)
        denoised = evaluate(schedule) if retry is None else retry(evaluate)
        denoised = denoised if wrap is None else wrap(denoised)
        return denoised if mask is None else torch.lerp(first, denoised, mask)

    device = schedule.pictures_device or model.final.linear.weight.device
    first = (cond.concat if start is None else start).to(device, torch.float32)
    noise = noise.to(first)
    mask = None if mask is None else mask.to(first).expand_as(first)
    x = first + levels[0] * noise
    try:
        return SOLVERS[solver](denoise, x, levels, callback or (lambda step: None))
    finally:
        run.release()
