"""Draw predicted peak memory against picture size: python -m benchmarks.memory [RESULT.json ...]

The planner's numbers for the released model in bf16, from 1024² to 16384², by budget; measured
points are added from results that `benchmarks.evaluation` wrote. Writes memory.json, with both
released DiMRs, and memory.png to benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.dimr.config import G_2R, XL_2R
from infdit_core.dimr.memory import sampling_bytes, weight_bytes
from infdit_core.memory.planner import Workload, evaluation_bytes, plans

from . import common
from .common import CONFIGS, RESULTS

SIDES = [1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
BUDGETS_GB = [6, 8, 12, 24, 80]


def workload(side: int) -> Workload:
    return Workload(CONFIGS["released"], side, side, torch.bfloat16)


def table() -> list[dict]:
    """The fastest schedule of every size and budget, where one fits."""
    rows = []
    for side in SIDES:
        found = plans(workload(side))
        for budget in BUDGETS_GB:
            fitting = [plan for plan in found if plan.peak_bytes <= budget * 1e9]
            for plan in fitting[:1]:
                row = {"side": side, "budget_gb": budget, "schedule": str(plan.schedule)}
                rows.append(row | {"peak_bytes": plan.peak_bytes, "host_bytes": plan.host_bytes})
    return rows


def dimr_table() -> list[dict]:
    """Both released DiMRs, alone and in batches."""
    return [
        {
            "model": name,
            "dtype": str(dtype),
            "batch": batch,
            "weight_bytes": weight_bytes(config, dtype),
            "sampling_bytes": sampling_bytes(config, batch, dtype),
        }
        for name, config in (("XL/2R", XL_2R), ("G/2R", G_2R))
        for dtype in (torch.bfloat16, torch.float32)
        for batch in (1, 4, 16)
    ]


def draw(measured: Sequence[Path]) -> None:
    """Predicted peak of four schedules by size, and crosses where it was measured."""
    curves = {
        "whole picture": lambda grid: Full(),
        "block by block, 4×4": lambda grid: BlockMajor(4),
        "layer by layer, one line": lambda grid: LayerMajor(grid.line_blocks),
        "the same, tokens on the host": lambda grid: LayerMajor(
            grid.line_blocks, tokens_on_host=True
        ),
    }
    with common.chart(
        RESULTS / "memory.png",
        title="Predicted peak memory of one evaluation, released model, bf16",
        xlabel="side of the result in pixels",
        ylabel="GB beside weights and pictures",
        xscale="log",
        yscale="log",
    ) as axes:
        for name, schedule in curves.items():
            works = [workload(side) for side in SIDES]
            peaks = [evaluation_bytes(work, schedule(work.grid)) / 1e9 for work in works]
            axes.plot(SIDES, peaks, marker=".", label=name)
        for path in measured:
            result = json.loads(path.read_text())
            peaks = [row["peak_bytes"] / 1e9 for row in result["schedules"] if "peak_bytes" in row]
            axes.plot([result["size"]] * len(peaks), peaks, "kx")
        axes.set_xticks(SIDES, [str(side) for side in SIDES], rotation=45)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("memory", __doc__)
    parser.add_argument("measured", type=Path, nargs="*", help="results of benchmarks.evaluation")
    args = common.parse(parser, argv)
    common.save(
        RESULTS / "memory.json", common.header(args) | {"rows": table(), "dimr": dimr_table()}
    )
    draw(args.measured)


if __name__ == "__main__":
    main()
