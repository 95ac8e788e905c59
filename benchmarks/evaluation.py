"""Time one evaluation by part and schedule: python -m benchmarks.evaluation [--config ...]

Writes benchmarks/results/evaluation_<device>_<config>_<dtype>_<size>.json after every row, and a
bar chart beside it. With a GPU, `--config released --device cuda --dtype bf16 --size 4096` gives
seconds, peak memory and the share of the device's measured matmul speed. Every row says how far its
D is from that of the first.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infdit_core.blocks.schedules import Schedule
from infdit_core.memory.adaptive import is_out_of_memory
from infdit_core.memory.planner import Workload, evaluation_bytes, evaluation_flop
from infdit_core.network import backends, fast
from infdit_core.network.condition import Condition
from infdit_core.network.config import DTYPES, LR_SCALE
from infdit_core.network.model import InfDiT
from infdit_core.network.run import Run

from . import common
from .common import CONFIGS, RESULTS


def measure(
    net: InfDiT, side: int, schedule: Schedule, rounds: int, parts: bool
) -> tuple[dict[str, Any], Tensor]:
    """A row: median seconds, peak bytes and, if wanted, parts of one evaluation; and its D."""
    weight = net.final.linear.weight
    device = weight.device
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(1, 3, side, side, device=device, generator=generator)
    lr = torch.rand(1, 3, side // LR_SCALE, side // LR_SCALE, device=device, generator=generator)
    cond = Condition(x.clamp(-1, 1), lr)
    run, seconds = Run(), []

    def evaluate() -> Tensor:
        return net.denoise(x, 1.0, cond, schedule, run=run)

    def evaluate_timed() -> None:
        seconds.extend(common.seconds(evaluate, device) for _ in range(rounds))

    try:
        denoised = evaluate().cpu()
        if device.type == "cuda":  # counting costs no time there
            peak = common.peak_bytes(evaluate_timed, device)
        else:
            evaluate_timed()
            peak = common.peak_bytes(evaluate, device)
        median = statistics.median(seconds)
        work = Workload(net.config, side, side, weight.dtype, fused=net.fused)
        row = {
            "seconds": round(median, 4),
            "seconds_all": [round(s, 4) for s in seconds],
            "flop_per_second": evaluation_flop(net.config, side, side) / median,
            "peak_bytes": peak,
            # beside it D, float32
            "predicted_bytes": evaluation_bytes(work, schedule) + 4 * x.numel(),
        }
        if parts:
            row["parts"] = seconds_by_part(evaluate, net, device)
        return row, denoised
    finally:
        run.release()


def seconds_by_part(
    evaluate: Callable[[], Any], net: InfDiT, device: torch.device
) -> dict[str, float]:
    """Seconds in each part and in none of the parts inside it; together the whole evaluation.

    By hooks and not by torch.profiler, which keeps 400 events for every chunk of every layer.
    """
    marks: list[tuple[str, Any]] = []

    def mark(part: str) -> None:
        if device.type == "cuda":
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        marks.append((part, at))

    with common.parts(net, mark):
        evaluate()
    common.synchronize(device)
    seconds: defaultdict[str, float] = defaultdict(float)
    for (part, start), (_, end) in pairwise(marks):
        seconds[part] += start.elapsed_time(end) / 1e3 if device.type == "cuda" else end - start
    return {part: round(taken, 4) for part, taken in seconds.items()}


@contextmanager
def ways_taken(without: Sequence[str], only: str | None) -> Iterator[None]:
    """Leave out ways of `infdit_core.network.fast`, and all attention kernels of a GPU but one."""
    devices, kernels = dict(fast.DEVICES), backends.BACKENDS["cuda"]
    fast.DEVICES.update({way: set() for way in without})
    if only is not None:
        backends.BACKENDS["cuda"] = tuple(b for b in kernels if b.__name__ == only)
    backends.forget()
    try:
        yield
    finally:
        fast.DEVICES.update(devices)
        backends.BACKENDS["cuda"] = kernels
        backends.forget()


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(common.seconds(lambda: torch.matmul(a, a), device) for _ in range(6))


def draw(result: dict[str, Any], path: Path) -> None:
    """One bar per schedule, made of the parts of the network."""
    rows = [row for row in result["schedules"] if "parts" in row]
    title = f"one evaluation, {result['size']}² px, {result['config']}, {result['dtype']}"
    with common.chart(path, xlabel="seconds", title=title) as axes:
        left = [0.0] * len(rows)
        for part in sorted({part for row in rows for part in row["parts"]}):
            widths = [row["parts"].get(part, 0.0) for row in rows]
            axes.barh([row["schedule"] for row in rows], widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(
        "evaluation", __doc__, "device", "dtype",
        config={"default": "small"}, size={"default": 512}, rounds={"default": 5}, schedules={},
    )  # fmt: skip
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--no-parts", action="store_true", help="seconds of the whole alone")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--without",
        nargs="+",
        choices=[*fast.DEVICES],
        default=[],
        help="ways of infdit_core.network.fast that are not taken",
    )
    ways.add_argument(
        "--each-way",
        action="store_true",
        help="none of them, then all, then all but each",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=[b.__name__ for b in backends.BACKENDS["cuda"]],
        help="attention kernels of a GPU, each by itself; what is chosen of them if left out",
    )
    parser.add_argument("--out", type=Path, help="instead of the name in benchmarks/results")
    args = common.parse(parser, argv)
    net = common.build(CONFIGS[args.config], DTYPES[args.dtype], args.device)
    matmul = matmul_speed(DTYPES[args.dtype], args.device)
    result = common.header(args, "config", "size", "dtype") | {
        "matmul_flop_per_second": matmul,
        "schedules": [],
    }
    name = f"evaluation_{args.device.type}_{args.config}_{args.dtype}_{args.size}.json"
    path = args.out or RESULTS / name
    schedules = args.schedules or common.schedules_for(net.config, args.size)
    each = [[*fast.DEVICES], [], *([way] for way in fast.DEVICES)]
    first: Tensor | None = None
    for compiled, without, only, schedule in product(
        {"no": [False], "yes": [True], "both": [False, True]}[args.compile],
        each if args.each_way else [args.without],
        args.backends or [None],
        schedules,
    ):
        net.compile_layers() if compiled else net.run_eagerly()
        row: dict[str, Any] = {"schedule": str(schedule), "compiled": compiled, "without": without}
        try:
            with ways_taken(without, only):
                measured, denoised = measure(
                    # hooks would change compiled parts
                    net,
                    args.size,
                    schedule,
                    args.rounds,
                    not (compiled or args.no_parts),
                )
                row["attention"] = backends.chosen()
            row |= measured
            row["share_of_matmul"] = round(row["flop_per_second"] / matmul, 4)
            first = denoised if first is None else first
            row["error_to_first"] = common.errors(denoised, first)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            row["out_of_memory"] = True
        result["schedules"].append(row)
        common.save(path, result)
        print(row, flush=True)
    if not args.no_parts and find_spec("matplotlib"):
        draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
