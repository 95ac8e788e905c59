"""One picture in strips against one process: python -m benchmarks.strips [--gpus 2]

Samples a square picture with the network of one configuration (random weights), by one process and
by several, in turn; one thread each on a CPU. What is timed is sampling alone, from the noise to
the picture that all have. Efficiency is the time of one over so many times that of several; beside
it stand the error, which is 0 if both are the same to the bit, and the bytes sent, as predicted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infdit_core import prepare
from infdit_core.blocks.grid import Grid
from infdit_core.cli.ranks import run_on_ranks
from infdit_core.distributed import StripSampler
from infdit_core.network.config import DTYPES
from infdit_core.sampling import Preset

from . import common
from .common import CONFIGS, RESULTS


def measure(args: argparse.Namespace) -> int:
    """One process of a run: the first writes seconds, a hash of the picture and all bytes sent."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(args.device)
    model = common.build(CONFIGS[args.config], DTYPES[args.dtype], device)
    block = model.config.block_px
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, args.size // 4, args.size // 4, 3, generator=generator)
    canvas = prepare(image, 4.0, block_px=block)
    draw = StripSampler(model, Preset("euler", args.steps))
    draw(prepare(image[:, : block // 2, : block // 2], 4.0, block_px=block))  # warms up
    before = draw.sent_bytes
    dist.barrier()
    started = time.perf_counter()
    picture = draw(canvas)
    took = time.perf_counter() - started
    total = torch.tensor(
        draw.sent_bytes - before, device=device if dist.get_backend() == "nccl" else "cpu"
    )
    dist.all_reduce(total)
    if args.ranks.first:
        row = [took, hashlib.sha256(picture.numpy().tobytes()).hexdigest(), int(total)]
        args.out_file.write_text(json.dumps(row))
    return 0


def run(args: argparse.Namespace, gpus: int) -> tuple[float, str, int]:
    """Seconds, hash of the picture and bytes sent."""
    with tempfile.TemporaryDirectory() as folder:
        given = vars(args) | {"gpus": gpus, "out_file": Path(folder) / "row.json"}
        given |= {"device": args.device.type, "schedule": "auto", "scratch": None, "debug": True}
        run_on_ranks(measure, argparse.Namespace(**given))
        seconds, digest, sent = json.loads((Path(folder) / "row.json").read_text())
    return seconds, digest, sent


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write strips_DEVICE.json."""
    parser = common.arguments("strips", __doc__, "config", "size", "device", "dtype", "rounds")
    parser.set_defaults(config="medium", size=1024)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    args = common.parse(parser, argv)
    alone: list[tuple[float, str, int]] = []
    several: list[tuple[float, str, int]] = []
    for _ in range(args.rounds):
        alone.append(run(args, 1))
        several.append(run(args, args.gpus))
    config = CONFIGS[args.config]
    side = args.size // config.block_px
    line = 2 * Grid(side, side).line_blocks * config.block_tokens * config.hidden_size
    predicted = (
        line * DTYPES[args.dtype].itemsize * config.num_layers * args.steps * (args.gpus - 1)
    )
    faster = statistics.median(a[0] / b[0] for a, b in zip(alone, several, strict=True))
    names = ("config", "size", "dtype", "gpus", "steps")
    result: dict[str, Any] = common.header(args, *names, blocks=f"{side}x{side}")
    result |= {
        "seconds_of_one": [round(a[0], 2) for a in alone],
        "seconds_of_several": [round(b[0], 2) for b in several],
        "efficiency": round(faster / args.gpus, 3),
        "same_bits": len({run[1] for run in [*alone, *several]}) == 1,
        "sent_bytes": several[0][2],
        "predicted_bytes": predicted,
    }
    common.save(RESULTS / f"strips_{args.device.type}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
