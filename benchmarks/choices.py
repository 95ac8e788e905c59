"""What the inexact choices gain and cost: python -m benchmarks.choices --pictures FOLDER

For each choice (bf16, the presets, 8-bit layers, reuse of layers, together): seconds of a whole
sampling beside the exact one's, in turn; max and rms of D against fp32 at three noise levels, for
what changes D; PSNR of the final picture against the exact one. Writes
benchmarks/results/choices_<device>.json. With a GPU:

    python -m benchmarks.choices --pictures FOLDER --device cuda --side 2048
    python -m benchmarks.choices --device cuda --config released --side 2048

The second has random weights, so its errors mean nothing: it is for the seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infdit_core import InfDiT, load_model
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.memory.planner import plan
from infdit_core.network.condition import Condition
from infdit_core.network.fp8 import use_fp8
from infdit_core.network.residual_cache import ResidualCache
from infdit_core.sampling import PRESETS, sample
from training.data import Photos, condition, reduce_bicubic

from .evaluation import CONFIGS, RESULTS, build, environment, synchronize

LEVELS = (0.1, 1.0, 10.0)
"""Sigmas at which D is compared."""


@dataclass(frozen=True)
class Choice:
    """How a picture is made."""

    preset: str = "exact"
    bf16: bool = False
    fp8: bool = False
    reuse: float = 0.0
    """Share of the layers that is left out where sigma is that of the last evaluation."""

    @property
    def name(self) -> str:
        words = [self.preset, "bf16" if self.bf16 else "", "fp8" if self.fp8 else ""]
        words.append(f"reuse {self.reuse:.0%}" if self.reuse else "")
        return ", ".join(word for word in words if word)


CHOICES = [
    Choice(bf16=True),
    Choice(bf16=True, fp8=True),
    Choice(bf16=True, reuse=0.5),
    Choice(bf16=True, reuse=0.75),
    Choice("fast", bf16=True),
    Choice("fast", bf16=True, fp8=True),
    Choice("draft", bf16=True),
    Choice(bf16=True, fp8=True, reuse=0.75),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="what training.photos made")
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER / "infdit_small.safetensors")
    parser.add_argument("--config", choices=CONFIGS, help="random weights of this size instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=256, help="of the result in pixels")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.config:
        exact = build(CONFIGS[args.config], torch.float32, device)
    else:
        exact = load_model(args.model, device)
    cond = picture(args.pictures, args.side, device)
    noise = torch.randn(cond.concat.shape, generator=torch.Generator().manual_seed(0)).to(device)

    reference = run(exact, cond, noise, Choice())
    denoised = {sigma: exact.denoise(cond.concat + sigma * noise, sigma, cond) for sigma in LEVELS}
    rows = []
    for choice in CHOICES:
        model = changed(exact, choice)
        row: dict = {"choice": choice.name, "evaluations": PRESETS[choice.preset].evaluations}
        row["d_error"] = {
            str(sigma): compare(
                model.denoise(cond.concat + sigma * noise, sigma, cond).float(), expected
            )
            for sigma, expected in denoised.items()
        }
        ratios = []
        for _ in range(args.rounds):
            before = seconds(exact, cond, noise, Choice(), device)
            ratios.append(seconds(model, cond, noise, choice, device) / before)
        row["time_ratio"] = round(statistics.median(ratios), 4)
        result = run(model, cond, noise, choice)
        row["psnr_to_exact"] = round(psnr(result, reference), 2)
        rows.append(row)
        print(row, flush=True)
        save(args, device, rows)


def save(args: argparse.Namespace, device: torch.device, rows: list[dict]) -> None:
    """Write what is measured so far."""
    what = args.config or args.model.name
    command = f"python -m benchmarks.choices --device {args.device} --side {args.side}"
    command += f" --config {args.config}" if args.config else " --pictures FOLDER"
    result = {
        "command": command,
        "model": what,
        "environment": environment(device),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    stem = f"choices_{device.type}" + (f"_{args.config}" if args.config else "")
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


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
    if choice.fp8:
        use_fp8(model)
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


def seconds(
    model: InfDiT, cond: Condition, noise: Tensor, choice: Choice, device: torch.device
) -> float:
    synchronize(device)
    started = time.perf_counter()
    run(model, cond, noise, choice)
    synchronize(device)
    return time.perf_counter() - started


def compare(result: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences of pictures in [-1, 1]."""
    error = result - expected
    rms = error.square().mean().sqrt().item()
    return {"max": round(error.abs().max().item(), 5), "rms": round(rms, 6)}


def psnr(result: Tensor, expected: Tensor) -> float:
    return 10 * torch.log10(4 / (result - expected).square().mean()).item()


if __name__ == "__main__":
    main()
