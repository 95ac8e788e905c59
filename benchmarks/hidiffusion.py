"""Time UNet evaluations with and without HiDiffusion: python -m benchmarks.hidiffusion ...

A UNet of SDXL's topology with random weights, its width reduced unless --full-width is given; by
turns plain and in every phase of HiDiffusion, so that ratios are of one run. Narrow layers make
attention a larger part of the whole than it is in SDXL, so the operations that SDXL itself needs
are counted besides. Needs a ComfyUI, in --comfyui or INFDIT_COMFYUI. Writes
benchmarks/results/hidiffusion_<device>_<dtype>_<width>.json after every size.
With a GPU: --full-width --device cuda --dtype fp16 --sizes 1024 1536 2048 4096
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from infdit_core.network.config import DTYPES

from . import common
from .common import RESULTS
from .common_sdxl import FULL, META, build_unet, evaluation, load_pack, operations

REDUCED = 32
"""Channels of the first level of the small stand-in."""
MODES = {
    " + ".join(names) or "plain": mode
    for mode in itertools.product((False, True), repeat=3)
    for names in [itertools.compress(("dilated", "pooled", "windows"), mode)]
}
"""(RAD, pool, window attention)."""
STEPS = 30


def measure(evaluate: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict:
    """Seconds and, on a GPU, peak memory beside the weights of every mode."""
    common.in_turn(evaluate, 1, device)  # warms up
    seconds = common.in_turn(evaluate, rounds, device)
    found: dict[str, dict[str, Any]] = {
        name: {
            "seconds": [round(s, 4) for s in times],
            "of_plain": common.ratio(times, seconds["plain"]),
        }
        for name, times in seconds.items()
    }
    if device.type == "cuda":
        for name, run in evaluate.items():
            found[name]["peak_bytes"] = common.peak_bytes(run, device)
    return found


def of_a_run(
    rules: ModuleType, size: tuple[int, int], cost: dict[str, float], windows: bool
) -> float:
    """Cost of a run of `STEPS` steps with the authors' phases, as a part of the plain model's."""
    ratios = rules.official_ratios(rules.SDXL, size, False)
    phases = rules.phases(rules.SDXL, ratios, aggressive=not rules.SDXL.is_large(size))
    names = {mode: name for name, mode in MODES.items()}
    rad, pool = phases.rad.steps(STEPS), phases.pool.steps(STEPS)
    total = sum(cost[names[i in rad, i in pool, windows]] for i in range(STEPS))
    return round(total / (STEPS * cost["plain"]), 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("hidiffusion", __doc__, "device", "dtype", "rounds", "comfyui")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536, 2048])
    parser.add_argument("--full-width", action="store_true", help="SDXL's own width, 2.6 G weights")
    args = common.parse(parser, argv)
    device, dtype = args.device, DTYPES[args.dtype]
    width = FULL if args.full_width else REDUCED

    hooks, rules = load_pack(args.comfyui, device)
    timed = hooks, rules, *build_unet(width, dtype, device)
    counted = hooks, rules, *build_unet(FULL, dtype, META)
    attention = importlib.import_module("comfy.ldm.modules.attention").optimized_attention

    result = common.header(args, "dtype", attention=attention.__name__, width=width, sizes={})
    path = RESULTS / f"hidiffusion_{device.type}_{args.dtype}_{width}.json"
    for side in args.sizes:
        modes = {name: evaluation(*timed, side, mode) for name, mode in MODES.items()}
        measured = measure(modes, args.rounds, device)
        flop = {name: operations(evaluation(*counted, side, mode)) for name, mode in MODES.items()}
        costs = {"seconds": {k: row["of_plain"] for k, row in measured.items()}, "flop": flop}
        runs = {
            f"{name}, {unit}": of_a_run(rules, (side // 8, side // 8), cost, windows)
            for name, windows in (("RAU-Net", False), ("RAU-Net + windows", True))
            for unit, cost in costs.items()
        }
        result["sizes"][side] = {
            "evaluation": measured,
            "flop_at_full_width": flop,
            f"run_of_{STEPS}_steps_of_plain": runs,
        }
        common.save(path, result)
        print(side, costs["seconds"], runs, flush=True)


if __name__ == "__main__":
    main()
