"""Write the averaged weights of a run as a checkpoint: python -m training.export RUN OUT

The file has the release's key names, bf16 weights, and how the model was trained as metadata.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from infdit_core.checkpoints.names import release_state_dict
from infdit_core.network.config import InfDiTConfig
from infdit_core.whole_files import whole_file
from training.train import STATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", help="of the trainer; that of this checkout if left out")
    args = parser.parse_args()
    export(args.run, args.out, args.commit)


def export(run: Path, out: Path, commit: str | None = None) -> None:
    """Convert RUN's state file to OUT."""
    state = torch.load(run / STATE, map_location="cpu", weights_only=True)
    config = InfDiTConfig(**state["config"])
    weights = release_state_dict(state["ema"], config)
    metadata = {
        "format": "pt",
        "infdit.config": json.dumps(asdict(config)),
        "infdit.dtype": "bf16",
        "infdit.training": json.dumps(state["settings"]),
        "infdit.steps": str(state["step"]),
        "infdit.data": "training/photos.tsv and comfyui-workflow-templates-media-image, -video",
        "infdit.commit": commit or _head(),
        "license": "Apache-2.0",
    }
    with whole_file(out) as file:
        file.write(save({k: v.bfloat16().contiguous() for k, v in weights.items()}, metadata))


def _head() -> str:
    command = ["git", "rev-parse", "HEAD"]
    root = Path(__file__).parent
    return subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
