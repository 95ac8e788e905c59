"""Pictures a minute of `infdit farm`, with one worker and with two, of one thread each.

Two plain processes that share the pictures out without Ray are what two workers could do at best
on a quiet machine; on a busy one Linux may give Ray's processes, each a session of its own, more
than their part. Runs take turns. Rates leave the start out: they count from the first result, with
two workers from the second; the start stands beside them.

On a machine that does other work too, two workers get less than two processors, whatever the farm
does. `busy` is what the farm itself decides about: the share of the time in which a worker computed
or waited for a processor, as Linux tells, and not for the farm. On free processors two workers make
as much of twice the pictures as `busy` of two is of `busy` of one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.common import RESULTS, ROOT, arguments, header, parse, save

KINDS = ("farm, 1 worker", "farm, 2 workers", "2 plain processes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("farm", __doc__, "rounds", "model")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--px", type=int, default=96, help="side of a picture, upscaled by 4")
    parser.add_argument("--beside", default="", help="what else the machine did, for the result")
    parser.add_argument("--out", type=Path, default=RESULTS / "farm.json")
    args = parse(parser, argv)
    import ray

    result = header(args, "pictures", "px", "rounds", "beside", ray=ray.__version__)
    result["environment"]["processors"] = os.cpu_count()
    result["runs"], result["summary"] = [], {}
    for n in range(args.rounds):
        for kind in KINDS if n % 2 == 0 else reversed(KINDS):
            result["runs"].append({"kind": kind, **run(kind, args.model, args.pictures, args.px)})
            result["summary"] = summary(result["runs"])
            save(args.out, result)
    return 0


def run(kind: str, model: Path, count: int, px: int) -> dict[str, Any]:
    """Make all pictures once, and say how fast."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        workers = 1 if "1" in kind else 2
        plain = "plain" in kind
        for n in range(count):
            path = source / (str(n % 2) if plain else "0") / f"{n:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(n).integers(0, 256, (px, px, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        options = ["--model", model]
        if plain:
            command = [["upscale", s, "-o", target, "--device", "cpu"] for s in source.iterdir()]
        else:
            command = [["farm", source / "0", target, "--workers", workers]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started, load = time.time(), psutil.getloadavg()[0]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "infdit_core", *map(str, [*words, *options])],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for words in command
        ]
        samples = [busy_seconds(processes, plain)]
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            if len([*target.glob("*.png")]) in range(workers, count):
                now, found = busy_seconds(processes, plain)
                # at the end Ray lets a worker go before the last picture of another
                samples.append((now, samples[-1][1] | found))
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{kind} failed")
        times = sorted(path.stat().st_mtime for path in target.glob("*.png"))
        if len(times) != count:
            raise RuntimeError(f"{kind}: expected {count} results, got {len(times)}")
        steady = times[-1] - times[workers - 1]
        return {
            "pictures_a_minute": round(60 * (count - workers) / steady, 2),
            "first_result_after_s": round(times[0] - started, 1),
            "busy": share(samples[1], samples[-1], workers),
            "whole_s": round(time.time() - started, 1),
            "load_before": round(load, 1),
        }


Busy = dict[tuple[int, str], float]
"""Seconds in which threads, by process and name, ran or waited for a processor."""


def busy_seconds(processes: list[subprocess.Popen], plain: bool) -> tuple[float, Busy]:
    """The time, and what the threads of the workers had done by then."""
    found: Busy = {}
    for process in processes:
        with suppress(psutil.Error, OSError):
            root = psutil.Process(process.pid)
            for worker in [root] if plain else root.children(recursive=True):
                if plain or worker.cmdline()[0].startswith("ray::MapWorker"):
                    for file in Path(f"/proc/{worker.pid}/task").glob("*/schedstat"):
                        ran, waited = map(int, file.read_text().split()[:2])
                        found[worker.pid, file.parent.name] = (ran + waited) / 1e9
    return time.monotonic(), found


def share(first: tuple[float, Busy], last: tuple[float, Busy], workers: int) -> float:
    """Of the time between two samples, what the busiest threads of the workers were busy."""
    most: dict[int, float] = {}
    for (pid, thread), seconds in last[1].items():
        worked = seconds - first[1].get((pid, thread), 0.0)
        most[pid] = max(most.get(pid, 0.0), worked)
    return round(sum(most.values()) / (last[0] - first[0]) / workers, 3)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that matter."""
    rates = {
        kind: statistics.median(found)
        for kind in KINDS
        if (found := [r["pictures_a_minute"] for r in runs if r["kind"] == kind])
    }
    if len(rates) < len(KINDS):
        return {"pictures_a_minute": rates}
    one, two, plain = (rates[kind] for kind in KINDS)
    busy = {k: statistics.median(r["busy"] for r in runs if r["kind"] == k) for k in KINDS}
    return {
        "pictures_a_minute": rates,
        "busy": busy,
        "busy_of_two_over_one": round(busy[KINDS[1]] / busy[KINDS[0]], 3),
        "two_workers_of_twice_one": round(two / (2 * one), 3),
        "two_workers_of_two_plain_processes": round(two / plain, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
