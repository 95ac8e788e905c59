"""What the inexact choices gain and cost: python -m benchmarks.choices --photos FOLDER

For each choice (bf16, the presets, 8-bit layers, reuse of layers, together): seconds of a whole
sampling beside the exact one's, in turn; max and rms of D against the exact one at three noise
levels; PSNR of the final picture against the exact one. Exact is preset `exact` in --dtype. Writes
benchmarks/results/choices_<device>.json after every row. With a GPU:

    python -m benchmarks.choices --photos FOLDER --device cuda --size 2048
    python -m benchmarks.choices --device cuda --config released --dtype bf16 --size 1024 --rounds 1

The second has random weights, so its errors mean nothing: it is for the seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infdit_core import InfDiT, load_model
from infdit_core.memory.planner import plan
from infdit_core.network.condition import Condition
from infdit_core.network.config import DTYPES
from infdit_core.network.residual_cache import ResidualCache
from infdit_core.sampling import PRESETS, sample
from training.data import Photos, condition, reduce_bicubic

from . import common
from .common import CONFIGS, RESULTS

LEVELS = (0.1, 1.0, 10.0)
"""Sigmas at which D is compared."""


@dataclass(frozen=True)
class Choice:
    """How a picture is made."""

    preset: str = "exact"
    bf16: bool = False
    reuse: float = 0.0
    """Share of the layers that is left out where sigma is that of the last evaluation."""

    @property
    def name(self) -> str:
        words = [self.preset, "bf16" if self.bf16 else ""]
        words.append(f"reuse {self.reuse:.0%}" if self.reuse else "")
        return ", ".join(word for word in words if word)


CHOICES = [
    Choice(bf16=True),
    Choice(bf16=True, reuse=0.5),
    Choice(bf16=True, reuse=0.75),
    Choice("fast", bf16=True),
    Choice("draft", bf16=True),
]


def picture(folder: Path | None, side: int, device: torch.device) -> Condition:
    """The condition of a held-out photograph, or of noise where there is none."""
    if folder is None:
        original = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    else:
        original = Photos(folder / "test", side).batch(1, np.random.default_rng(3))
    cond = condition(reduce_bicubic(original))
    return Condition(cond.concat.to(device), cond.lr.to(device))


def changed(exact: InfDiT, choice: Choice) -> InfDiT:
    """A copy of the network as a choice wants it."""
    model = copy.deepcopy(exact)
    if choice.bf16:
        model.bfloat16()
    return model


def run(model: InfDiT, cond: Condition, noise: Tensor, choice: Choice) -> Tensor:
    """The picture, (1, 3, H, W) float32."""
    preset, config = PRESETS[choice.preset], model.config
    height, width = noise.shape[-2:]
    weight = model.final.linear.weight
    return sample(
        model,
        cond,
        preset.sigmas(),
        noise=noise,
        solver=preset.solver,
        schedule=plan(config, height, width, weight.dtype, float("inf"), device=weight.device.type),
        cache=ResidualCache(round(choice.reuse * config.num_layers)) if choice.reuse else None,
    ).clamp(-1, 1)


def compare(result: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences of pictures in [-1, 1]."""
    error = result - expected
    rms = error.square().mean().sqrt().item()
    return {"max": round(error.abs().max().item(), 5), "rms": round(rms, 6)}


def psnr(result: Tensor, expected: Tensor) -> float:
    return 10 * torch.log10(4 / (result - expected).square().mean()).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(
        "choices", __doc__, "model", "config", "device", "dtype",
        photos={"required": False}, size={"default": 256}, rounds={"default": 2},
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", help="names of choices, as in the result")
    args = common.parse(parser, argv)
    device, dtype = args.device, DTYPES[args.dtype]
    if args.config:
        exact = common.build(CONFIGS[args.config], dtype, device)
    else:
        exact = load_model(args.model, device, dtype)
    cond = picture(args.photos, args.size, device)
    noise = torch.randn(cond.concat.shape, generator=torch.Generator().manual_seed(0)).to(device)
    what = args.config or args.model.name
    result = common.header(args, model=what, dtype=args.dtype) | {"rows": []}
    name = f"choices_{device.type}" + (f"_{args.config}" if args.config else "")

    def denoised(model: InfDiT, sigma: float) -> Tensor:
        return model.denoise(cond.concat + sigma * noise, sigma, cond).float()

    expected = {sigma: denoised(exact, sigma) for sigma in LEVELS}
    reference = run(exact, cond, noise, Choice())
    for choice in CHOICES:
        if args.only and choice.name not in args.only:
            continue
        model = changed(exact, choice)
        drawn = run(model, cond, noise, choice)
        d_error = {str(s): compare(denoised(model, s), d) for s, d in expected.items()}
        runs = {
            "exact": partial(run, exact, cond, noise, Choice()),
            "choice": partial(run, model, cond, noise, choice),
        }
        seconds = common.in_turn(runs, args.rounds, device)
        row = {
            "choice": choice.name,
            "evaluations": PRESETS[choice.preset].evaluations,
            "d_error": d_error,
            "time_ratio": common.ratio(seconds["choice"], seconds["exact"]),
            "psnr_to_exact": round(psnr(drawn, reference), 2),
        }
        result["rows"].append(row)
        print(row, flush=True)
        common.save(RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
