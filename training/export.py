"""Write the averaged weights of a run as a checkpoint: python -m training.export RUN OUT

RUN is a folder of `training.train` or a file of `training.recipe`. OUT has the release's key names,
bf16 weights, and how the model was trained and wants to be sampled as metadata.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from infdit_core.checkpoints.names import release_state_dict
from infdit_core.network.config import InfDiTConfig
from infdit_core.sampling import AUTO, AUTO_KEY, find_preset
from infdit_core.whole_files import whole_file
from training.clock import CONFIG
from training.prior import read_priors
from training.resumable import STATE

OURS = {
    "infdit.data": "training/photos.tsv and comfyui-workflow-templates-media-*",
    "license": "Apache-2.0",
}
"""Metadata of models that are trained here from random weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", help="of the trainer; that of this checkout if left out")
    parser.add_argument("--toward", type=Path, help="another file of the recipe to mix in")
    parser.add_argument("--share", type=float, default=0.5, help="of that file in the mixture")
    parser.add_argument(
        "--prior", type=Path, nargs="+", help="files whose mean prior is taken in place of RUN's"
    )
    parser.add_argument("--preset", help="what the preset auto does, as infdit_core.sampling reads")
    parser.add_argument("--training", help="how a file of training.recipe was made, in words")
    args = parser.parse_args()
    if args.run.is_dir():
        export(args.run, args.out, args.commit)
        return
    config, weights = CONFIG, load_file(args.run)
    notes = OURS | {"infdit.training": args.training or "training.recipe"}
    if args.toward:
        other = load_file(args.toward)
        weights = {key: value.lerp(other[key], args.share) for key, value in weights.items()}
    if args.prior:
        weights, config = with_prior(weights, config, read_priors(args.prior))
    if args.preset:
        find_preset(AUTO, {AUTO_KEY: args.preset})  # fails now where it cannot be read
        notes[AUTO_KEY] = args.preset
    write(config, weights, args.out, notes | {"infdit.commit": args.commit or head()})


def export(run: Path, out: Path, commit: str | None = None) -> None:
    """Convert the state file of a RUN of `training.train` to OUT."""
    state = torch.load(run / STATE, map_location="cpu", weights_only=True)
    notes = OURS | {
        "infdit.training": json.dumps(state["settings"]),
        "infdit.steps": str(state["step"]),
        "infdit.commit": commit or head(),
    }
    write(InfDiTConfig(**state["config"]), state["ema"], out, notes)


def with_prior(
    weights: dict[str, Tensor], config: InfDiTConfig, prior: dict[str, Tensor]
) -> tuple[dict[str, Tensor], InfDiTConfig]:
    """The weights with another prior, and the config that fits it."""
    width = len(prior["prior.head.bias"])
    depth = sum(key.endswith("a.bias") for key in prior)
    weights = {key: value for key, value in weights.items() if not key.startswith("prior.")}
    return weights | prior, replace(config, prior_width=width, prior_depth=depth)


def write(
    config: InfDiTConfig,
    weights: dict[str, Tensor],
    out: Path,
    notes: Mapping[str, str],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights under the names of `InfDiT` to OUT, with `notes` in its metadata.

    Args:
        others: tensors that go with them under the release's names, such as a CLIP tower.
    """
    weights = {**release_state_dict(weights, config), **(others or {})}
    metadata = {
        **notes,
        "format": "pt",
        "infdit.config": json.dumps(asdict(config)),
        "infdit.dtype": "bf16",
    }
    with whole_file(out) as file:
        file.write(save({k: v.bfloat16().contiguous() for k, v in weights.items()}, metadata))


def head() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    root = Path(__file__).parent
    return subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
