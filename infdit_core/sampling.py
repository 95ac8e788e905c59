"""Solvers of the EDM probability flow ODE (Karras et al., arXiv 2206.00364).

Every solver has the signature `solver(denoise, x, sigmas, callback)`, where `denoise(x, sigma)`
returns D(x; sigma), and reports each step through `callback` before it takes it. x and D are the
solver's own, which it works on in place: besides them it keeps the derivatives that its method
needs, and no other picture.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .bands import flat_bands
from .blocks.grid import Strip
from .blocks.schedules import Full, Schedule
from .edm import RHO, SIGMA_MAX, partial_sigmas
from .errors import InfDiTError
from .network.condition import Condition
from .network.model import InfDiT
from .network.run import Run
from .resume import State
from .scratch import Empty, in_memory

Denoise = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """What a solver reports when it has denoised the picture of a step.

    The pictures are the solver's: it goes on in their memory when the callback returns.
    """

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


class Keeping(NamedTuple):
    """Where a solver's pictures live, and what is kept of its steps."""

    like: Callable[[Tensor], Tensor] = torch.empty_like
    """Makes room for another picture."""
    history: Sequence[Tensor] = ()
    """Derivatives of earlier steps, as `after` was given them: to go on where a run ended."""
    after: Callable[[Tensor, list[Tensor]], None] = lambda x, history: None
    """Called after each step with x and derivatives: all that later steps need."""


Solver = Callable[..., Tensor]
"""`solver(denoise, x, sigmas, callback, keeping=None)`: x at the last of the sigmas."""


def to_d(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dsigma of the probability flow ODE."""
    return (x - denoised) / sigma


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    callback: Callback,
    keeping: Keeping | None = None,
) -> Tensor:
    """Euler's method: one evaluation a step."""
    keeping = keeping or Keeping()
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        _advance(x, denoised, sigma, following)
        del denoised  # it would live beside the next one
        keeping.after(x, [])
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    callback: Callback,
    keeping: Keeping | None = None,
) -> Tensor:
    """Heun's method (algorithm 1): two evaluations a step, one for the last step to 0."""
    keeping = keeping or Keeping()
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        if following > 0:
            _advance_twice(denoise, x, denoised, sigma, following, keeping.like(x))
        else:
            _advance(x, denoised, sigma, following)
        del denoised
        keeping.after(x, [])
    return x


def _advance(x: Tensor, denoised: Tensor, sigma: float, following: float) -> None:
    """Take x along its derivative to the next noise level."""
    for x_, denoised_ in flat_bands(x, denoised):
        x_ += (following - sigma) * to_d(x_, sigma, denoised_)


def _advance_twice(
    denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, following: float, room: Tensor
) -> None:
    """Take x along the mean of its derivative and that where it leads, which comes to `room`."""
    d, predicted, step = denoised, room, following - sigma
    for x_, d_, predicted_ in flat_bands(x, d, predicted):
        d_.copy_(to_d(x_, sigma, d_))
        torch.add(x_, step * d_, out=predicted_)
    corrected = denoise(predicted, following)
    for x_, d_, predicted_, corrected_ in flat_bands(x, d, predicted, corrected):
        x_ += step * ((d_ + to_d(predicted_, following, corrected_)) / 2)


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def multistep(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    callback: Callback,
    keeping: Keeping | None = None,
) -> Tensor:
    """Linear multistep: one evaluation a step, of four steps once they are there.

    Adams-Bashforth with the weights of equal steps whatever the sigmas are, as pseudo numerical
    methods do (iPNDM: Liu et al., arXiv 2202.09778, Zhang and Chen, arXiv 2204.13902). With equal
    steps in log sigma it was nearer to the solution than methods that integrate a polynomial in
    sigma or log sigma exactly (benchmarks/results/solvers_without_prior.json).
    """
    keeping = keeping or Keeping()
    history = list(keeping.history)
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        callback(Step(i, len(sigmas) - 1, sigma, x, denoised))
        if following == 0:
            return denoised  # a long step in log sigma, which Euler's method takes exactly to D
        history.insert(0, denoised)
        _advance_by_history(x, history, sigma, following)
        del denoised, history[len(_ADAMS_BASHFORTH) - 1 :]
        keeping.after(x, history)
    return x


def _advance_by_history(x: Tensor, history: list[Tensor], sigma: float, following: float) -> None:
    """Take x along its derivative and earlier ones; the first is D yet, and becomes that."""
    weights = _ADAMS_BASHFORTH[len(history) - 1]
    for x_, *bands in flat_bands(x, *history):
        bands[0].copy_(to_d(x_, sigma, bands[0]))
        for weight, d_ in zip(weights, bands, strict=True):
            x_ += (following - sigma) * weight * d_


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
SOLVER_PICTURES = {"heun": 4, "euler": 2, "multistep": 2 + len(_ADAMS_BASHFORTH) - 1}
"""Pictures at the peak, in an evaluation: x, the D that it writes, and derivatives."""
STATE_PICTURES = {"heun": 1, "euler": 1, "multistep": len(_ADAMS_BASHFORTH)}
"""What a step leaves to the next at most: x, and derivatives."""
logger = logging.getLogger(__name__)

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


_ALIGNED = 16
"""torch draws normal numbers in sixteens: pieces of whole sixteens have the bits of one call."""
_PIECE = 2**20


def gaussian(shape: Sequence[int], seed: int, rows: slice = slice(None)) -> Iterator[Tensor]:
    """The numbers of `torch.randn(shape)` after `manual_seed(seed)` on the CPU, piece by piece.

    Args:
        shape: (B, C, H, W) of the whole picture.
        rows: of it; those of others are drawn too, since each number follows from the one before.

    Yields:
        (n,) float32: pieces of the (B, C, rows, W) in the order of its memory.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    top, bottom, _ = rows.indices(height)
    plane, total = height * width, math.prod(shape)
    start = 0
    while start < total:
        stop = min(start + _PIECE, total)
        if total - stop < _ALIGNED:  # what is left would be drawn in another way
            stop = total
        drawn = torch.randn(stop - start, generator=generator)
        for n in range(start // plane, (stop - 1) // plane + 1):
            first = max(start, n * plane + top * width)
            last = min(stop, n * plane + bottom * width)
            if first < last:
                yield drawn[first - start : last - start]
        start = stop


def _noisy(first: Tensor, sigma: float, noise: Tensor | Iterable[Tensor], x: Tensor) -> Tensor:
    """x = first + sigma · noise, written to x and returned."""
    if isinstance(noise, Tensor):
        for x_, first_, noise_ in flat_bands(x, first, noise):
            torch.add(first_, sigma * noise_.to(x), out=x_)
        return x
    start, flat, first = 0, x.view(-1), first.reshape(-1)
    for piece in noise:
        there = slice(start, start + len(piece))
        torch.add(first[there], sigma * piece.to(x), out=flat[there])
        start += len(piece)
    return x


@torch.no_grad()
def sample(
    model: InfDiT,
    cond: Condition,
    sigmas: Tensor,
    *,
    noise: Tensor | Iterable[Tensor],
    solver: str = "heun",
    schedule: Schedule | None = None,
    retry: Retry | None = None,
    callback: Callback | None = None,
    run: Run | None = None,
    start: Tensor | None = None,
    wrap: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    strip: Strip | None = None,
    empty: Empty = in_memory,
    state: State | None = None,
) -> Tensor:
    """Draw a picture: start from the LR picture plus noise and follow the ODE to sigma 0.

    Args:
        model: the network.
        cond: the condition, on any device.
        sigmas: (n + 1,) falling noise levels that end in 0, as from `edm_sigmas`.
        noise: (B, 3, H, W) unit Gaussian, or pieces of it as from `gaussian`; with a mask whole.
        solver: a name in `SOLVERS`.
        schedule: the order of computation in the network.
        retry: calls each evaluation with a schedule of its own choice, such as `Adaptive.call`,
            which takes a smaller one when memory runs out.
        callback: called with a `Step` once in every step; may raise to cancel. Its pictures are
            overwritten afterwards.
        run: a new one, with what is wanted of it; it is released at the end.
        start: (B, 3, H, W) in [-1, 1], the picture to start from in place of the LR picture.
        wrap: fills margins of a (B, 3, H, W), before and after every evaluation.
        mask: (B, 1, H, W), 1 where the picture is drawn and 0 where it stays that of the start.
        strip: of a picture whose other strips are drawn elsewhere at the same time; all pictures
            here are of the strip, `cond.lr` of the whole.
        empty: makes room for the solver's pictures.
        state: keeps what each step leaves to the next, and knows where an earlier run ended.

    Returns:
        (B, 3, H, W) float32, about [-1, 1], not clipped.

    Raises:
        InfDiTError: the solver is unknown, or the sigmas do not fall.
    """
    if solver not in SOLVERS:
        raise InfDiTError(f"unknown solver {solver!r}, expected one of {', '.join(SOLVERS)}")
    levels = check_sigmas(sigmas)
    schedule = schedule or Full()
    run = run or Run()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if mask is not None:
            x = torch.lerp(first + sigma * cast("Tensor", noise), x, mask)
        if wrap is not None:
            x = wrap(x)
        room = like(x)

        def evaluate(schedule: Schedule) -> Tensor:
            return model.denoise(x, sigma, cond, schedule, run=run, strip=strip, out=room)

        denoised = evaluate(schedule) if retry is None else retry(evaluate)
        denoised = denoised if wrap is None else wrap(denoised)
        return denoised if mask is None else torch.lerp(first, denoised, mask)

    def like(x: Tensor) -> Tensor:
        return empty(x.shape, x.device)

    first = cond.concat if start is None else start
    x = empty(first.shape, schedule.pictures_device or model.device)
    first = first.to(x)
    if mask is not None:
        if not isinstance(noise, Tensor):
            noise = torch.cat(list(noise)).view(x.shape)
        mask, noise = mask.to(first).expand_as(first), noise.to(first)
    steps = len(levels) - 1
    done, history = (0, []) if state is None else state.load(x, like)
    if done:
        logger.warning("Inf-DiT: going on after step %d of %d", done, steps)
    else:
        _noisy(first, levels[0], noise, x)

    def report(step: Step) -> None:
        nonlocal current
        current = done + step.index + 1
        if callback is not None:
            callback(step._replace(index=current - 1, total=steps))

    def after(x: Tensor, history: list[Tensor]) -> None:
        if state is not None and current < steps:
            state.save(current, x, history)

    current = done
    try:
        if done < steps:
            keeping = Keeping(like, history, after)
            del history  # it would keep what the solver lets go
            x = SOLVERS[solver](denoise, x, levels[done:], report, keeping)
            if state is not None:
                state.save(steps, x, [])
        return x
    finally:
        run.release()
