"""What half precision costs DiMR: python -m benchmarks.dimr_precision

Relative L2 distance of bf16 and fp16 from fp32, weights and computation: of one evaluation at
several times, and of a latent after 50 evaluations with guidance. The tiny networks are the
recordings' (every parameter random); those of the released sizes start as training does, with
random time-dependent parameters, XL/2R also with weights three times as large. `largest` is the
largest number that a linear layer or convolution takes or gives; fp16 ends at 65504.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from infdit_core.dimr.config import G_2R, XL_2R, DiMRConfig
from infdit_core.dimr.layers import TimeDependent
from infdit_core.dimr.load import load_model
from infdit_core.dimr.model import DiMR
from infdit_core.dimr.sampling import CFG_SCALE, sample
from infdit_core.network.config import DTYPES
from training.dimr import initialise

from . import common

GOLDEN = common.ROOT / "tests" / "golden" / "dimr"
TINY_HEADS = {"tiny_2r": 4, "tiny_3r": 2}
SIZES = {"XL/2R": (XL_2R, (1.0, 3.0)), "G/2R": (G_2R, (1.0,))}
"""And how much larger than at the start of training the weights are."""
TIMES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.001)
FEW_TIMES = (1.0, 0.5, 0.001)
"""For the released sizes."""
EVALUATIONS = 50
ROWS_STD = 0.3
"""Of what is added to the time-dependent parameters, which start at 0 and 1."""


def random_model(config: DiMRConfig, scale: float) -> DiMR:
    """As training starts; weights of linear layers `scale` times as large, all times different."""
    torch.manual_seed(0)
    model = initialise(DiMR(config)).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(scale)
        if isinstance(module, TimeDependent):
            module.rows.weight.add_(torch.randn_like(module.rows.weight), alpha=ROWS_STD)
    return model


def distance(x: Tensor, reference: Tensor) -> float | None:
    """Relative L2; None where numbers were too large for the format."""
    if not x.isfinite().all():
        return None
    return float(f"{((x - reference).norm() / reference.norm()).item():.2e}")


@contextmanager
def largest(model: DiMR) -> Iterator[list[float]]:
    """Collects the largest absolute values that linear layers and convolutions take and give."""
    found: list[float] = []

    def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(max(inputs[0].abs().max().item(), output.abs().max().item()))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def forward(model: DiMR, dtypes: Sequence[str], times: Sequence[float]) -> dict:
    """The distances at these times, of one latent of class 207."""
    config = model.config
    side = config.latent_side
    x = torch.randn(1, config.channels, side, side, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([207])
    result: dict = {}
    with largest(model) as found:
        exact = {t: model(x, torch.tensor([t]), classes) for t in times}
    result["largest"] = round(max(found), 1)
    for name in dtypes:
        half = copy.deepcopy(model).to(DTYPES[name])
        cast = x.to(DTYPES[name])
        result[name] = {
            str(t): distance(half(cast, torch.tensor([t]), classes), exact[t]) for t in times
        }
    return result


def sampled(model: DiMR, dtypes: Sequence[str]) -> dict[str, float | None]:
    """The distances of the latents that a run ends with."""
    config = model.config
    side = config.latent_side
    noise = torch.randn(2, config.channels, side, side, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([3, 207])

    def run(model: DiMR, dtype: torch.dtype) -> Tensor:
        return sample(
            model, noise, classes, evaluations=EVALUATIONS, cfg_scale=CFG_SCALE, dtype=dtype
        )

    exact = run(model, torch.float32)
    halves = {name: copy.deepcopy(model).to(DTYPES[name]) for name in dtypes}
    return {name: distance(run(half, DTYPES[name]), exact) for name, half in halves.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("dimr_precision", __doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    args = common.parse(parser, argv)
    halves = [name for name in DTYPES if name != "fp32"]
    result = common.header(args) | {"forward": {}, "sampled": {}}
    path = common.RESULTS / "dimr_precision.json"
    for name, heads in TINY_HEADS.items():
        model = load_model(GOLDEN / f"{name}.safetensors", heads=heads)
        result["forward"][name] = forward(model, halves, TIMES)
        result["sampled"][name] = sampled(model, halves)
        print(name, result["forward"][name], result["sampled"][name], flush=True)
    for name in args.sizes:
        config, scales = SIZES[name]
        for scale in scales:
            row = f"{name}, weights × {scale:g}"
            result["forward"][row] = forward(random_model(config, scale), halves, FEW_TIMES)
            print(row, result["forward"][row], flush=True)
            common.save(path, result)
    common.save(path, result)


if __name__ == "__main__":
    main()
