"""Measure reading and writing of TIFF: python -m benchmarks.tiff [--sides 8192 16384]

A photograph is enlarged into a mapped file, written (8 bits, deflate) and read into another one,
each in a process of its own: seconds, those of the CPU, and how far its anonymous memory grows
beyond what it was; pages of a mapped file are the system's. Beside it the same in memory. Writes
tiff.json to benchmarks/results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from infdit_core.pictures.files import read_image, write_image
from infdit_core.pictures.levels import bands

from . import common

SOURCE = common.ROOT / "examples" / "demo_photo.png"
RUNS = {
    "write, mapped": ("write", "mapped", "a.tif"),
    "write, pyramid, mapped": ("write", "mapped", "pyramid.tif"),
    "write, in memory": ("write", "memory", "b.tif"),
    "read, mapped": ("read", "mapped", "a.tif"),
    "read, in memory": ("read", "memory", "a.tif"),
}


def mapped(path: Path, shape: Sequence[int]) -> torch.Tensor:
    """Float32 room in a file."""
    count = torch.Size(shape).numel()
    flat = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    return flat.view(tuple(shape))


def anonymous_bytes() -> int:
    """Of this process, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def watched(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and how far anonymous memory grew meanwhile, looked at every 5 ms."""
    before, ended = anonymous_bytes(), threading.Event()
    most = [before]

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.process_time()
    taken = common.seconds(run, torch.device("cpu"))
    cpu = time.process_time() - started
    ended.set()
    thread.join()
    grown = most[0] - before
    return {"seconds": round(taken, 2), "cpu_seconds": round(cpu, 2), "anonymous_bytes": grown}


def make_source(path: Path, side: int) -> None:
    """The photograph, repeated and enlarged by 16, with the noise of a camera: 8-bit steps."""
    photo = read_image(SOURCE)[0].movedim(-1, 1)
    tile = F.interpolate(photo, scale_factor=16, mode="bicubic")[0].movedim(0, -1)  # (h, w, 3)
    rows, columns = (torch.arange(side) % n for n in tile.shape[:2])
    target = mapped(path, (1, side, side, 3))
    generator = torch.Generator().manual_seed(0)
    for band in bands(side, 3 * side):
        part = tile[rows[band]][:, columns]
        target[0, band] = part + torch.randn(part.shape, generator=generator) / 255


def one(kind: str, where: str, name: str, folder: Path, side: int) -> dict[str, float]:
    """A run in this process."""
    shape = (1, side, side, 3)
    warm = folder / "warm.tif"
    write_image(warm, torch.zeros(1, 64, 64, 3))
    read_image(warm)
    if kind == "read":
        empty = (lambda shape: mapped(folder / "room", shape)) if where == "mapped" else None
        return watched(lambda: read_image(folder / name, empty))
    picture = mapped(folder / "source", shape)
    if where == "memory":
        picture = picture.clone()
    return watched(lambda: write_image(folder / name, picture, pyramid=name == "pyramid.tif"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("tiff", __doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--folder", type=Path, help="where the files are for a while")
    args = common.parse(parser, argv)
    result = common.header(args, "sides") | {"rows": []}
    for side in args.sides:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            make_source(folder / "source", side)
            for run in args.runs:
                command = [sys.executable, "-m", "benchmarks.tiff", "--one"]
                words = [*RUNS[run], str(folder), str(side)]
                made = subprocess.run([*command, *words], stdout=subprocess.PIPE, check=True)
                row = {"side": side, "run": run} | json.loads(made.stdout)
                row["mb_per_cpu_second"] = round(3 * side * side / 1e6 / row["cpu_seconds"], 1)
                row["file_bytes"] = (folder / RUNS[run][2]).stat().st_size
                result["rows"].append(row)
                sys.stderr.write(f"{row}\n")
                common.save(common.RESULTS / "tiff.json", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, where, name, folder, side = sys.argv[2:]
        sys.stdout.write(json.dumps(one(kind, where, name, Path(folder), int(side))))
    else:
        main()
