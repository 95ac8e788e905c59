"""The bundled model on a device, as users run it: python -m benchmarks.bundled --device cuda

How far its pictures are from the CPU's in fp32; seconds, plan and peak memory of a first and a
second call by size; how far the orders of computation are from each other; seconds of the command
line, Python's start included. Writes benchmarks/results/bundled_<device>.json after every row.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infdit_core import Sampler, load_model, upscale
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from infdit_core.memory.planner import Plan, Workload, peak_bytes
from infdit_core.network.config import DTYPES
from infdit_core.pictures.prepare import Canvas

from . import common
from .common import BUNDLED_MODEL, RESULTS, ROOT

PHOTO = ROOT / "examples" / "demo_photo.png"
EXACT_SIDE = 128
ORDERS: tuple[Schedule, ...] = (
    Full(),
    LayerMajor(64),
    LayerMajor(64, tokens_on_host=True),
    BlockMajor(8),
    BlockMajor(8, frontier_on_host=True),
    LayerMajor(64, True, keep_lr=False, pictures_device="cpu", stream_weights=True),
)


class Timed(Sampler):
    """Keeps the seconds of the prior and of the drawing, and the plan."""

    prior_seconds = drawing_seconds = 0.0
    planned: Plan
    work: Workload

    def plan(self, canvas: Canvas, strip: Any = None) -> Any:
        adaptive = super().plan(canvas, strip)
        self.planned, self.work = adaptive.plan, self._workload(canvas, strip)
        return adaptive

    def prepare(self, canvas: Canvas) -> Canvas:
        made = [canvas]
        self.prior_seconds = common.seconds(
            lambda: made.append(super(Timed, self).prepare(canvas)), self.device
        )
        return made[-1]

    def __call__(self, canvas: Canvas) -> Tensor:
        made: list[Tensor] = []
        self.drawing_seconds = common.seconds(
            lambda: made.append(super(Timed, self).__call__(canvas)), self.device
        )
        return made[-1]


def photo(side: int) -> Image.Image:
    return Image.open(PHOTO).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def image(side: int) -> Tensor:
    """(1, side, side, 3) in 0..1."""
    return torch.from_numpy(np.asarray(photo(side), dtype=np.float32) / 255)[None]


def against_cpu(device: torch.device) -> dict[str, dict[str, float]]:
    """Differences of pictures on the device from the CPU's in fp32, by the number format."""
    exact = upscale(image(EXACT_SIDE), model=load_model(BUNDLED_MODEL))
    models = {name: load_model(BUNDLED_MODEL, device, DTYPES[name]) for name in ("fp32", "bf16")}
    made = {name: upscale(image(EXACT_SIDE), model=model) for name, model in models.items()}
    return {name: common.errors(picture, exact) for name, picture in made.items()}


def call(draw: Timed, side: int) -> dict[str, Any]:
    """One call for a picture of side×side px."""
    if draw.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(draw.device)
    seconds = common.seconds(lambda: upscale(image(side), 4.0, draw), draw.device)
    row: dict[str, Any] = {
        "size": 4 * side,
        "seconds": round(seconds, 3),
        "prior_seconds": round(draw.prior_seconds, 3),
        "drawing_seconds": round(draw.drawing_seconds, 3),
        "plan": str(draw.planned),
        "predicted_bytes": peak_bytes(draw.work, draw.planned.schedule),
    }
    if draw.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(draw.device)
    return row


def orders(device: torch.device, dtype: torch.dtype, side: int) -> dict[str, dict[str, float]]:
    """Differences from the whole picture at once, by the order of computation."""
    found: dict[str, dict[str, float]] = {}
    first: Tensor | None = None
    for schedule in ORDERS:
        model = load_model(BUNDLED_MODEL, device, dtype)
        made = upscale(image(side), 4.0, model=model, schedule=schedule)
        first = made if first is None else first
        found[str(schedule)] = common.errors(made, first)
    return found


def command_line(device: torch.device) -> float:
    """Seconds of a process that makes one small picture."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.png", Path(folder) / "out.png"
        photo(EXACT_SIDE).save(source)
        words = [str(source), "-o", str(target), "--device", str(device)]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "infdit_core", "upscale", *words], check=True)
        return round(time.perf_counter() - started, 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("bundled", __doc__, "device")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="of the inputs")
    args = common.parse(parser, argv)
    path = RESULTS / f"bundled_{args.device.type}.json"
    result = common.header(args)

    def keep(name: str, value: Any) -> None:
        result[name] = value
        common.save(path, result)
        print(name, value, flush=True)

    keep("command_line_seconds", command_line(args.device))
    keep("against_cpu", against_cpu(args.device))
    for side in args.sides:
        draw = Timed(load_model(BUNDLED_MODEL, args.device, torch.bfloat16))
        for number in ("first", "second"):
            keep(f"{side} to {4 * side}, bf16, {number} call", call(draw, side))
    for name in ("fp32", "bf16"):
        differences = orders(args.device, DTYPES[name], args.sides[0])
        keep(f"orders, {args.sides[0]} to {4 * args.sides[0]}, {name}", differences)


if __name__ == "__main__":
    main()
