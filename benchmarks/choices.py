"""What the inexact choices gain and cost: python -m benchmarks.choices --photos FOLDER

For each choice (bf16, the presets, 8-bit layers, reuse of layers, together): seconds of a whole
upscaling beside the exact one's, in turn; max and rms of D against the exact one at three noise
levels; PSNR of the final picture against the exact one and against the original. Exact is preset
`exact` in --dtype, and for choices of preset `auto`, which draws another picture in fewer steps,
`auto` in --dtype. Writes benchmarks/results/choices_<device>.json after every row. With a GPU:

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
from infdit_core.network.config import DTYPES
from infdit_core.sampling import AUTO, AUTO_KEY, find_preset
from training.data import Photos

from . import common
from .common import CONFIGS, RESULTS
from .common_photos import degrade, model_condition, upscaler

LEVELS = (0.01, 0.1, 1.0)
"""Sigmas at which D is compared, of the model's highest."""


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
    Choice(AUTO, bf16=True),
    Choice(bf16=True),
    Choice(bf16=True, reuse=0.5),
    Choice(bf16=True, reuse=0.75),
    Choice("fast", bf16=True),
    Choice("draft", bf16=True),
]


def picture(folder: Path | None, side: int) -> Tensor:
    """A held-out photograph, or noise where there is none: (1, 3, side, side) in 0..1."""
    if folder is None:
        return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return (Photos(folder / "test", side).batch(1, np.random.default_rng(3)) + 1) / 2


def changed(exact: InfDiT, choice: Choice) -> InfDiT:
    """A copy of the network as a choice wants it."""
    model = copy.deepcopy(exact)
    if choice.bf16:
        model.bfloat16()
    return model


def run(model: InfDiT, lr: Tensor, choice: Choice) -> Tensor:
    """The picture, (1, 3, 4 h, 4 w) in 0..1, of a (1, 3, h, w)."""
    reuse_layers = round(choice.reuse * model.config.num_layers)
    return upscaler(model, preset=choice.preset, reuse_layers=reuse_layers)(lr)


def compare(result: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences of pictures in [-1, 1]."""
    error = result - expected
    rms = error.square().mean().sqrt().item()
    return {"max": round(error.abs().max().item(), 5), "rms": round(rms, 6)}


def psnr(result: Tensor, expected: Tensor) -> float:
    """In dB, of pictures in 0..1."""
    return round(-10 * (result - expected).square().mean().log10().item(), 2)


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
    original = picture(args.photos, args.size)
    lr = degrade(original, "bicubic", "")
    concat = model_condition(exact, lr * 2 - 1).concat
    noise = torch.randn(concat.shape, generator=torch.Generator().manual_seed(0)).to(device)
    what = args.config or args.model.name
    result = common.header(args, model=what, dtype=args.dtype) | {"rows": []}
    name = f"choices_{device.type}" + (f"_{args.config}" if args.config else "")

    def denoised(model: InfDiT, level: float) -> Tensor:
        sigma = level * exact.config.sigma_max
        return model.denoise(concat + sigma * noise, sigma, model_condition(model, lr * 2 - 1))

    expected = {level: denoised(exact, level).float() for level in LEVELS}
    references = {"exact": Choice()}
    if AUTO_KEY in exact.metadata:
        references[AUTO] = Choice(AUTO)
    drawn = {preset: run(exact, lr, choice) for preset, choice in references.items()}
    result["psnr"] = {preset: psnr(picture, original) for preset, picture in drawn.items()}
    for choice in CHOICES:
        if args.only and choice.name not in args.only:
            continue
        if choice.preset == AUTO and AUTO not in references:
            continue  # it would be exact
        to = choice.preset if choice.preset in references else "exact"
        model = changed(exact, choice)
        found = run(model, lr, choice)
        d_error = {str(s): compare(denoised(model, s).float(), d) for s, d in expected.items()}
        runs = {
            "exact": partial(run, exact, lr, references[to]),
            "choice": partial(run, model, lr, choice),
        }
        seconds = common.in_turn(runs, args.rounds, device)
        row = {
            "choice": choice.name,
            "evaluations": find_preset(choice.preset, exact.metadata).evaluations,
            "compared_with": to,
            "d_error": d_error,
            "time_ratio": common.ratio(seconds["choice"], seconds["exact"]),
            "psnr_to_exact": psnr(found, drawn[to]),
            "psnr": psnr(found, original),
        }
        result["rows"].append(row)
        print(row, flush=True)
        common.save(RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
