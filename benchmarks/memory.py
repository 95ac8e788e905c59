"""Draw predicted peak memory against picture size: python -m benchmarks.memory [RESULT.json ...]

The planner's numbers for the released model in bf16, from 1024² to 16384², by budget; measured
points are added from results that `benchmarks.evaluation` wrote. Writes memory.json and memory.png
to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.memory.planner import Workload, evaluation_bytes, plans

from .evaluation import CONFIGS, RESULTS

SIDES = [1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
BUDGETS_GB = [6, 8, 12, 24, 80]


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, nargs="*", help="results of benchmarks.evaluation")
    args = parser.parse_args()
    config, dtype = CONFIGS["released"], torch.bfloat16

    table = []
    for side in SIDES:
        found = plans(Workload(config, side, side, dtype))
        for budget in BUDGETS_GB:
            chosen = next((p for p in found if p.peak_bytes <= budget * 1e9), None)
            if chosen is not None:
                table.append(
                    {
                        "side": side,
                        "budget_gb": budget,
                        "schedule": str(chosen.schedule),
                        "peak_bytes": chosen.peak_bytes,
                        "host_bytes": chosen.host_bytes,
                    }
                )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(table, indent=1) + "\n")

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    curves = {
        "whole picture": lambda grid: Full(),
        "block by block, 4×4": lambda grid: BlockMajor(4),
        "layer by layer, one line": lambda grid: LayerMajor(grid.shorter),
        "the same, tokens on the host": lambda grid: LayerMajor(grid.shorter, tokens_on_host=True),
    }
    for name, schedule in curves.items():
        works = [Workload(config, side, side, dtype) for side in SIDES]
        peaks = [evaluation_bytes(work, schedule(work.grid)) / 1e9 for work in works]
        axes.plot(SIDES, peaks, marker=".", label=name)
    for path in args.measured:
        result = json.loads(path.read_text())
        peaks = [row["peak_bytes"] / 1e9 for row in result["schedules"] if "peak_bytes" in row]
        axes.plot([result["size"]] * len(peaks), peaks, "kx")
    axes.set(xscale="log", yscale="log", xlabel="side of the result in pixels")
    axes.set_xticks(SIDES, [str(side) for side in SIDES], rotation=45)
    axes.set_ylabel("GB beside weights and pictures")
    axes.set_title("Predicted peak memory of one evaluation, released model, bf16")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
