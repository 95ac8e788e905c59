"""How far D is from held-out pictures: python -m training.evaluate MODEL --photos FOLDER

A quicker judge of training than pictures: rms distance in levels of 255 between D(x + noise; sigma)
and x, by noise level and degradation, beside that of bicubic interpolation. MODEL is a checkpoint,
or the folder of a run, whose averaged weights are taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infdit_core.checkpoints.load import load_model
from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT
from training.data import Photos, condition, reduce_bicubic
from training.degrade import reduce_realistic
from training.resumable import STATE

SIGMAS = (0.05, 0.15, 0.4, 1.0, 3.0, 40.0)
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "bicubic": reduce_bicubic,
    "realesrgan": lambda pictures: reduce_realistic(pictures, np.random.default_rng(5)),
}


@torch.no_grad()
def evaluate(model: InfDiT, pictures: Tensor, lr: Tensor) -> tuple[list[float], float]:
    """Rms distances in levels of 255 for pictures (B, 3, H, W) in [-1, 1] and their LR pictures.

    Returns:
        Those of D for every noise level of `SIGMAS`, and that of bicubic interpolation.
    """
    cond = condition(lr)
    generator = torch.Generator().manual_seed(0)

    def levels(guess: Tensor) -> float:
        return (guess - pictures).square().mean().sqrt().item() * 127.5

    found = []
    for sigma in SIGMAS:
        noise = torch.randn(pictures.shape, generator=generator)
        found.append(levels(model.denoise(pictures + sigma * noise, sigma, cond)))
    return found, levels(cond.concat)


def read(path: Path) -> InfDiT:
    """A checkpoint, or the averaged weights of a run."""
    if path.is_file():
        return load_model(path)
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    model = InfDiT(InfDiTConfig(**state["config"]), device="meta")
    model.load_state_dict(state["ema"], assign=True)
    return model.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="what photos.py made")
    parser.add_argument("--crops", type=int, default=24, help="of 128 px")
    args = parser.parse_args()
    model = read(args.model)
    pictures = Photos(args.photos / "test", 128).batch(args.crops, np.random.default_rng(1))
    print("sigma".ljust(12) + "".join(f"{sigma:>8}" for sigma in SIGMAS) + " bicubic")
    for name, reduce in REDUCE.items():
        found, interpolated = evaluate(model, pictures, reduce(pictures))
        print(name.ljust(12) + "".join(f"{v:>8.2f}" for v in (*found, interpolated)))


if __name__ == "__main__":
    main()
