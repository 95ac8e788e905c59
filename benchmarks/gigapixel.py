"""Memory of a large picture's run with --scratch: python -m benchmarks.gigapixel [SIDE ...]

Each side is run by the command line in a process of its own, with the small bundled model on the
CPU, for one step of Euler's method: a second one takes the same memory. The peak of its anonymous
memory is read from /proc while it runs: memory of the process, not the pages of its files, which
are the system's. Tensors are counted in another run of the side --count, and compared with the
plan; a run of 2048² in memory must give the same bits in the same order of computation. Linux only.
Writes gigapixel.json to benchmarks/results.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infdit_core import BlockMajor, Sampler, load_model, upscale
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.memory.planner import weight_bytes
from infdit_core.pictures.files import read_image, write_image
from infdit_core.pictures.prepare import prepare
from infdit_core.sampling import Preset
from infdit_core.scratch import Scratch
from tools.comfy_server import ROOT

from . import common
from .common import RESULTS

MODEL = BUNDLED_FOLDER / "infdit_small.safetensors"
PICTURE = ROOT / "examples" / "demo_photo.png"
SCALE, STEP = 4, Preset("euler", 1)


def source(side: int) -> Tensor:
    """(1, side / 4, side / 4, 3): the example photograph, repeated to a size."""
    image, small = read_image(PICTURE)[0][..., :3], side // SCALE
    times = [-(-small // length) for length in image.shape[1:3]]
    return image.repeat(1, *times, 1)[:, :small, :small].contiguous()


def anonymous(process: subprocess.Popen) -> int:
    """Peak of a process's anonymous memory in bytes, until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * kib for kib in found)])
        except OSError:
            pass
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return peak


def command(side: int, folder: Path) -> dict:
    """What a run of the command line takes."""
    picture = folder / f"{side}.tif"
    write_image(picture, source(side))
    words = ["upscale", str(picture), "-o", str(folder / f"{side}_x4.tif"), "--steps", "1"]
    line = [sys.executable, "-m", "infdit_core", *words, "--scratch", str(folder / "scratch")]
    started = time.monotonic()
    peak = anonymous(subprocess.Popen(line, cwd=ROOT))
    return {"side": side, "anonymous_bytes": peak, "seconds": round(time.monotonic() - started)}


def counted(side: int, folder: Path) -> dict:
    """Tensors alive at the peak of a whole run, and what the plan says."""
    model, image = load_model(MODEL, "cpu", torch.float32), source(side)
    with Scratch(folder / "scratch") as scratch:
        draw = Sampler(model, STEP, scratch=scratch)
        plan = draw.plan(prepare(image, block_px=draw.block_px, empty=scratch.empty)).plan
        with LiveBytes() as live:
            upscale(image, float(SCALE), draw)
    planned = plan.peak_bytes - weight_bytes(model.config, torch.float32)
    return {
        "side": side,
        "schedule": str(plan.schedule),
        "planned_bytes": planned,
        "counted_bytes": live.peak,
        "counted_over_planned": round(live.peak / planned, 3),
    }


def compared(side: int, folder: Path) -> dict:
    """Whether a picture in files has the bits of one in memory."""
    model, image = load_model(MODEL, "cpu", torch.float32), source(side)
    draw = {"model": model, "preset": STEP, "schedule": BlockMajor(8, keep_lr=False)}
    with Scratch(folder / "scratch") as scratch:
        in_files = sha(upscale(image, float(SCALE), scratch=scratch, **draw))
    in_memory = sha(upscale(image, float(SCALE), **draw))
    return {"side": side, "in_files_sha256": in_files, "in_memory_sha256": in_memory}


def sha(picture: Tensor) -> str:
    return hashlib.sha256(picture.contiguous().view(-1).numpy().data.cast("B")).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("gigapixel", __doc__)
    parser.add_argument("sides", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--count", type=int, default=4096, help="the side to count tensors for")
    parser.add_argument("--folder", type=Path, help="on a disk with room; a temporary one if left")
    args = common.parse(parser, argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        result = {"process_alone_bytes": command(64, folder)["anonymous_bytes"]}
        result["bits"] = compared(2048, folder)
        rows = [command(side, folder) for side in args.sides]
        for before, row in itertools.pairwise(rows):
            row["growth"] = round(row["anonymous_bytes"] / before["anonymous_bytes"], 2)
        result |= {"rows": rows, "counted": counted(args.count, folder)}
    common.save(RESULTS / "gigapixel.json", common.header(args) | result)


if __name__ == "__main__":
    main()
