"""How few evaluations are enough: python -m benchmarks.solvers --pictures FOLDER [--comfyui SOURCE]

Samples test pictures with every solver, number of evaluations and spacing of sigmas, and measures
the rms distance to Heun's method with 120 steps from the same noise, in 0..1 scale. With --comfyui
the core samplers of that ComfyUI are measured beside our own. Writes solvers.json and solvers.png
to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infdit_core import LayerMajor, edm_sigmas, load_model
from infdit_core.checkpoint import BUNDLED_FOLDER
from infdit_core.edm import SIGMA_MAX, SIGMA_MIN
from infdit_core.sampling import SOLVERS
from training.data import Photos, condition, reduce_bicubic

from .evaluation import RESULTS, environment

REFERENCE_STEPS = 120
CORE_SAMPLERS = [
    "dpmpp_2m",
    "ipndm",
    "ipndm_v",
    "deis",
    "lms",
    "gradient_estimation",
    "res_multistep",
]
EVALUATIONS = [5, 6, 8, 10, 12, 16, 20]
SPACINGS = {
    "karras (rho 7)": lambda n: edm_sigmas(n),
    "rho 5": lambda n: edm_sigmas(n, rho=5.0),
    "rho 10": lambda n: edm_sigmas(n, rho=10.0),
    "exponential": lambda n: torch.cat(
        [torch.logspace(np.log10(SIGMA_MAX), np.log10(SIGMA_MIN), n), torch.zeros(1)]
    ),
}

Run = Callable[[Callable, Tensor, Tensor], Tensor]


def own(name: str) -> Run:
    solver = SOLVERS[name]
    return lambda denoise, x, sigmas: solver(denoise, x, sigmas.tolist(), lambda step: None)


def core(name: str) -> Run:
    function = getattr(importlib.import_module("comfy.k_diffusion.sampling"), f"sample_{name}")

    def run(denoise: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
        def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            return denoise(x, float(sigma[0]))

        return function(model, x, sigmas, extra_args={}, disable=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="what training.photos made")
    parser.add_argument("--comfyui", type=Path, help="source folder of a ComfyUI")
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER / "infdit_small.safetensors")
    parser.add_argument("--count", type=int, default=4, help="crops of 128 px")
    args = parser.parse_args()
    runs = {f"own {name}": own(name) for name in SOLVERS}
    if args.comfyui:
        sys.argv = sys.argv[:1]
        sys.path.insert(0, str(args.comfyui))
        importlib.import_module("comfy.cli_args").args.cpu = True
        runs |= {f"core {name}": core(name) for name in CORE_SAMPLERS}

    model = load_model(args.model)
    pictures = Photos(args.pictures / "test", 128).batch(args.count, np.random.default_rng(2))
    cond = condition(reduce_bicubic(pictures))
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    lr_kv = model.lr_keys_values(cond.lr)
    schedule = LayerMajor(16)

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float) -> Tensor:
        return model.denoise(x, sigma, cond, schedule, lr_kv=lr_kv)

    def sampled(run: Run, sigmas: Tensor) -> Tensor:
        return run(denoise, cond.concat + sigmas[0] * noise, sigmas).clamp(-1, 1)

    reference = sampled(own("heun"), edm_sigmas(REFERENCE_STEPS))
    rows = []
    for name, run in runs.items():
        for spacing, sigmas in SPACINGS.items():
            for evaluations in [*EVALUATIONS, 39] if name == "own heun" else EVALUATIONS:
                steps = (evaluations + 1) // 2 if name == "own heun" else evaluations
                error = (sampled(run, sigmas(steps)) - reference) / 2
                rms = error.square().mean().sqrt().item()
                rows.append({"solver": name, "spacing": spacing, "evaluations": evaluations})
                rows[-1] |= {"rms": round(rms, 5), "max": round(error.abs().max().item(), 4)}
                print(rows[-1], flush=True)
    result = {"environment": environment(torch.device("cpu")), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "solvers.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, RESULTS / "solvers.png")


def draw(rows: list[dict], path: Path) -> None:
    """Error against evaluations with the release's spacing, one line per solver."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    first = next(iter(SPACINGS))
    for name in dict.fromkeys(row["solver"] for row in rows):
        points = [(r["evaluations"], r["rms"]) for r in rows
                  if r["solver"] == name and r["spacing"] == first]  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="evaluations", ylabel="rms to Heun with 120 steps", yscale="log")
    axes.set_title(f"bundled model, {first}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
