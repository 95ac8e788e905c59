"""Several GPUs at work on one picture: core's clones of the model take a strip each."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.model_patcher
import torch

from ...infdit_core.blocks.grid import Strip
from ...infdit_core.blocks.schedules import Schedule
from ...infdit_core.blocks.strips import in_strips
from ...infdit_core.network.condition import Condition
from .runs import ConditionState, PlannedRun, ran_out_of_memory

CLONES = "infdit_clones"
"""Key in `transformer_options`: patchers on several GPUs with their speeds; absent: one GPU."""

Clones = Sequence[tuple[comfy.model_patcher.ModelPatcher, float]]


def strips_for_clones(executor, model, conds, x_in, timestep, model_options):
    """A wrapper of CALC_COND_BATCH: the clones of MultiGPU Work Units take strips of the picture.

    Core would give each a condition of its own, of which there is mostly one.
    """
    if clones := model_options.get("multigpu_clones"):
        speeds = model_options.get("multigpu_options", {})
        found = [
            (patcher, speeds.get(device, {}).get("relative_speed", 1.0))
            for device, patcher in clones.items()
        ]
        options = model_options.get("transformer_options", {}) | {CLONES: found}
        model_options = {k: v for k, v in model_options.items() if k != "multigpu_clones"}
        model_options["transformer_options"] = options
    return executor(model, conds, x_in, timestep, model_options)


def evaluate_in_strips(
    clones: Clones,
    x: torch.Tensor,
    sigma: torch.Tensor,
    cond: Condition,
    state: ConditionState,
    options: dict,
    schedule: Schedule | None,
    memory_bytes: float | None,
) -> torch.Tensor:
    """F (B, 3, H, W) of a picture that several GPUs compute, a strip each.

    Where memory runs out on one, all compute the evaluation again, that one with a smaller plan.

    Args:
        options: `transformer_options`.
        schedule: that was asked for; None for the fastest that fits on each.
        memory_bytes: what a plan may take on each; None for what is free there.
    """
    models = {patcher.load_device: patcher.model.diffusion_model for patcher, _ in clones}
    runs = {
        device: models[device].ready(state, options, device, patcher)
        for device, (patcher, _) in zip(models, clones, strict=True)
    }
    failed: list[PlannedRun] = []

    def compute(strip: Strip, device: torch.device) -> torch.Tensor:
        model, run = models[device], runs[device]
        if strip.link.has_after:  # the last strip is done last, and tells how far all are
            run.progress = _only_interrupted
        place = (..., *strip.chunk.scaled(model.net.config.block_px))
        own = x[place].to(device)
        part = Condition(
            cond.concat[place].to(device),
            cond.lr.to(device),
            None if cond.vector is None else cond.vector.to(device),
        )
        base = None if state.base is None else state.base[place]
        order = schedule or run.plan(model.net, own, memory_bytes, strip).plan.schedule
        try:
            out = model.evaluate(own, sigma.to(device), part, order, run, base, strip)
        except (RuntimeError, MemoryError) as error:
            if ran_out_of_memory(error):
                failed.append(run)
            raise
        return out.to(x.device)

    grid = next(iter(models.values())).net.grid(x)
    speeds = [speed for _, speed in clones]
    while True:
        try:
            parts = in_strips(grid, [*models], compute, speeds)
            return torch.cat(parts, dim=-1 if grid.by_columns else -2)
        except (RuntimeError, MemoryError) as error:
            if not failed or schedule is not None:
                raise
            failure = error.with_traceback(None)
        if not all(run.adaptive is not None and run.adaptive.shrink() for run in failed):
            raise failure
        failed.clear()


def _only_interrupted(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
