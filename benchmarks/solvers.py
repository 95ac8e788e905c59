"""How few evaluations are enough: python -m benchmarks.solvers --photos FOLDER [--comfyui SOURCE]

Samples test pictures with every solver, number of evaluations and spacing of sigmas, and measures
the rms distance to Heun's method with 120 steps from the same noise, in 0..1 scale. With --comfyui
the core samplers of that ComfyUI are measured beside our own. Other spacings than the release's are
tried with the multistep solvers, and sigmas are optimised for ours, on other pictures. Writes
solvers.json, after every row, and solvers.png to benchmarks/results.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infdit_core import InfDiT, LayerMajor, edm_sigmas, load_model
from infdit_core.edm import SIGMA_MAX, SIGMA_MIN
from infdit_core.network.run import Run
from infdit_core.sampling import SOLVERS
from training.data import Photos, condition, reduce_bicubic

from . import common
from .common import RESULTS

REFERENCE_STEPS = 120
CORE_SAMPLERS = [
    "dpmpp_2m",
    "ipndm",
    "ipndm_v",
    "deis",
    "lms",
    "gradient_estimation",
]
EVALUATIONS = [5, 6, 8, 10, 12, 16, 20]
SPACINGS = {
    "karras (rho 7)": lambda n: edm_sigmas(n),
    "rho 5": lambda n: edm_sigmas(n, rho=5.0),
    "rho 10": lambda n: edm_sigmas(n, rho=10.0),
    "exponential": lambda n: edm_sigmas(n, rho=math.inf),
}
SPACED = {"own multistep", "core ipndm", "core deis", "core dpmpp_2m"}
OPTIMISED = [6, 12]
"""Evaluations for which sigmas are optimised."""
TRIALS = 40

Draw = Callable[[Callable, Tensor, Tensor], Tensor]
"""From a denoiser, the noisy picture and sigmas to the picture."""


def own(name: str) -> Draw:
    solver = SOLVERS[name]
    return lambda denoise, x, sigmas: solver(denoise, x, sigmas.tolist(), lambda step: None)


def core(name: str) -> Draw:
    function = getattr(importlib.import_module("comfy.k_diffusion.sampling"), f"sample_{name}")

    def run(denoise: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
        def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            return denoise(x, float(sigma[0]))

        return function(model, x, sigmas, extra_args={}, disable=True)

    return run


class Measure:
    """Distance to the reference on crops of 128 px.

    Args:
        model: the network.
        folder: of photographs.
        count: of crops.
    """

    def __init__(self, model: InfDiT, folder: Path, count: int) -> None:
        pictures = Photos(folder, 128).batch(count, np.random.default_rng(2))
        self._model, self._cond = model, condition(reduce_bicubic(pictures))
        self._noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        self._run = Run()
        self._reference = self._sampled(own("heun"), edm_sigmas(REFERENCE_STEPS))

    def error(self, run: Draw, sigmas: Tensor) -> tuple[float, float]:
        """Root mean square and largest difference, for pictures in 0..1."""
        error = (self._sampled(run, sigmas) - self._reference) / 2
        return round(error.square().mean().sqrt().item(), 5), round(error.abs().max().item(), 4)

    def _sampled(self, run: Draw, sigmas: Tensor) -> Tensor:
        x = self._cond.concat + sigmas[0] * self._noise
        return run(self._denoise, x, sigmas).clamp(-1, 1)

    @torch.no_grad()
    def _denoise(self, x: Tensor, sigma: float) -> Tensor:
        return self._model.denoise(x, sigma, self._cond, LayerMajor(16), run=self._run)


def optimised(measure: Measure, run: Draw, steps: int, trials: int) -> Tensor:
    """Sigmas by random search: steps in log sigma get longer or shorter than equal.

    Keeps a change where it is better.
    """
    generator = np.random.default_rng(0)

    def sigmas(shape: np.ndarray) -> Tensor:
        length = np.exp(np.interp(np.linspace(0, 1, steps - 1), np.linspace(0, 1, 4), shape))
        along = np.concatenate([[0.0], np.cumsum(length) / length.sum()])
        levels = SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** along
        return torch.tensor([*levels, 0.0], dtype=torch.float32)

    best = np.zeros(4)
    smallest = measure.error(run, sigmas(best))[0]
    for trial in range(trials):
        tried = best + generator.normal(size=4) * 0.6 * (1 - trial / trials)
        error = measure.error(run, sigmas(tried))[0]
        if error < smallest:
            best, smallest = tried, error
    return sigmas(best)


def draw(rows: list[dict]) -> None:
    """Error against evaluations: a line for every solver with the release's spacing, and ours."""
    first = next(iter(SPACINGS))

    def points(solver: str, spacing: str) -> list[list[float]]:
        found = [row for row in rows if (row["solver"], row["spacing"]) == (solver, spacing)]
        return [[row[key] for row in found] for key in ("evaluations", "rms")]

    with common.chart(
        RESULTS / "solvers.png",
        title=f"bundled model, {first}",
        xlabel="evaluations",
        ylabel=f"rms to Heun with {REFERENCE_STEPS} steps",
        yscale="log",
    ) as axes:
        for name in dict.fromkeys(row["solver"] for row in rows):
            axes.plot(*points(name, first), marker=".", label=name)
        for spacing, style in (("exponential", "k.-"), ("optimised", "k*")):
            label = f"own multistep, {spacing} sigmas"
            axes.plot(*points("own multistep", spacing), style, label=label)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("solvers", __doc__, "photos", "model", "comfyui")
    parser.add_argument("--count", type=int, default=4, help="crops of 128 px")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of sigmas, for each count")
    args = common.parse(parser, argv)
    runs = {f"own {name}": own(name) for name in SOLVERS}
    if args.comfyui:
        common.add_comfyui(args.comfyui, torch.device("cpu"))
        runs |= {f"core {name}": core(name) for name in CORE_SAMPLERS}

    model = load_model(args.model)
    test, train = (Measure(model, args.photos / name, args.count) for name in ("test", "train"))
    result = common.header(args, model=args.model.name) | {"rows": []}

    def add(name: str, spacing: str, run: Draw, sigmas: Tensor, evaluations: int) -> None:
        rms, largest = test.error(run, sigmas)
        row = {"solver": name, "spacing": spacing, "evaluations": evaluations, "rms": rms}
        row["max"] = largest
        if spacing == "optimised":
            row["sigmas"] = [round(s, 4) for s in sigmas.tolist()]
        result["rows"].append(row)
        print(row, flush=True)
        common.save(RESULTS / "solvers.json", result)

    for name, run in runs.items():
        for spacing, sigmas in SPACINGS.items() if name in SPACED else [*SPACINGS.items()][:1]:
            for evaluations in [*EVALUATIONS, 39] if name == "own heun" else EVALUATIONS:
                steps = (evaluations + 1) // 2 if name == "own heun" else evaluations
                add(name, spacing, run, sigmas(steps), evaluations)
    for steps in OPTIMISED:
        run = own("multistep")
        add("own multistep", "optimised", run, optimised(train, run, steps, args.trials), steps)
    draw(result["rows"])


if __name__ == "__main__":
    main()
