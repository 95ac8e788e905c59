"""How few evaluations are enough: python -m benchmarks.solvers --photos FOLDER [--comfyui SOURCE]

Samples test pictures with every solver, number of evaluations and spacing of sigmas, from the same
noise, and measures the rms distance to Heun's method with 120 steps, in 0..1 scale, and the PSNR
against the original. With --comfyui the core samplers of that ComfyUI are measured beside our own.
The sigmas start where the model's do. Writes solvers.json, after every row, and solvers.png to
benchmarks/results.
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
from infdit_core.network.run import Run
from infdit_core.sampling import AUTO, AUTO_KEY, SOLVERS, find_preset
from training.data import Photos, reduce_bicubic

from . import common
from .common import RESULTS
from .common_photos import model_condition

REFERENCE_STEPS = 120
CORE_SAMPLERS = [
    "dpmpp_2m",
    "ipndm",
    "ipndm_v",
    "deis",
    "lms",
    "gradient_estimation",
]
EVALUATIONS = [1, 2, 3, 4, 6, 8, 10, 12, 20]
HEUN_EVALUATIONS = [1, 3, 5, 7, 9, 11, 19, 39]
SPACINGS = {"karras (rho 7)": 7.0, "exponential": math.inf}
SPACED = {"own multistep", "core ipndm", "core deis", "core dpmpp_2m"}
"""Measured with every spacing, the others with the first."""

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
    """Distances on crops of 128 px.

    Args:
        model: the network.
        folder: of photographs.
        count: of crops.
    """

    def __init__(self, model: InfDiT, folder: Path, count: int) -> None:
        self._originals = Photos(folder, 128).batch(count, np.random.default_rng(2))
        self._model = model
        self._cond = model_condition(model, reduce_bicubic(self._originals))
        shape = self._originals.shape
        self._noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._run = Run()
        sigmas = edm_sigmas(REFERENCE_STEPS, sigma_max=model.config.sigma_max)
        self._reference = self._sampled(own("heun"), sigmas)

    def reference(self) -> dict[str, float]:
        """The PSNR of the reference."""
        return {"psnr": self._psnr(self._reference)}

    def errors(self, run: Draw, sigmas: Tensor) -> dict[str, float]:
        """Root mean square and largest distance to the reference in 0..1, and the PSNR."""
        drawn = self._sampled(run, sigmas)
        error = (drawn - self._reference) / 2
        rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
        return {"rms": round(rms, 5), "max": round(largest, 4), "psnr": self._psnr(drawn)}

    def _psnr(self, drawn: Tensor) -> float:
        """Against the originals, in dB: the mean over the crops."""
        squares = ((drawn - self._originals) / 2).square().mean((1, 2, 3))
        return round(-10 * squares.log10().mean().item(), 2)

    def _sampled(self, run: Draw, sigmas: Tensor) -> Tensor:
        x = self._cond.concat + sigmas[0] * self._noise
        return run(self._denoise, x, sigmas).clamp(-1, 1)

    @torch.no_grad()
    def _denoise(self, x: Tensor, sigma: float) -> Tensor:
        return self._model.denoise(x, sigma, self._cond, LayerMajor(16), run=self._run)


def draw(rows: list[dict]) -> None:
    """Error against evaluations: a line for every solver with the release's spacing, and ours."""
    first, last = SPACINGS

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
        axes.plot(*points("own multistep", last), "k.-", label=f"own multistep, {last} sigmas")
        axes.plot(*points("own euler", AUTO), "k*", label="preset auto")


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("solvers", __doc__, "photos", "model", "comfyui")
    parser.add_argument("--count", type=int, default=4, help="crops of 128 px")
    args = common.parse(parser, argv)
    runs = {f"own {name}": own(name) for name in SOLVERS}
    if args.comfyui:
        common.add_comfyui(args.comfyui, torch.device("cpu"))
        runs |= {f"core {name}": core(name) for name in CORE_SAMPLERS}

    model = load_model(args.model)
    sigma_max = model.config.sigma_max
    measure = Measure(model, args.photos / "test", args.count)
    result = common.header(args, model=args.model.name, sigma_max=sigma_max)
    result |= {"reference": measure.reference(), "rows": []}

    def add(name: str, spacing: str, run: Draw, sigmas: Tensor, evaluations: int) -> None:
        row = {"solver": name, "spacing": spacing, "evaluations": evaluations}
        row |= measure.errors(run, sigmas)
        result["rows"].append(row)
        print(row, flush=True)
        common.save(RESULTS / "solvers.json", result)

    if AUTO_KEY in model.metadata:
        preset = find_preset(AUTO, model.metadata)
        sigmas, run = preset.sigmas(sigma_max=sigma_max), own(preset.solver)
        add(f"own {preset.solver}", AUTO, run, sigmas, preset.evaluations)
    for name, run in runs.items():
        for spacing, rho in SPACINGS.items() if name in SPACED else [*SPACINGS.items()][:1]:
            for evaluations in HEUN_EVALUATIONS if name == "own heun" else EVALUATIONS:
                steps = (evaluations + 1) // 2 if name == "own heun" else evaluations
                add(
                    name, spacing, run, edm_sigmas(steps, sigma_max=sigma_max, rho=rho), evaluations
                )
    draw(result["rows"])


if __name__ == "__main__":
    main()
