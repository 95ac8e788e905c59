"""The engine's own sampler, with a network whose weights ComfyUI loads, patches and moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...infdit_core.blocks.grid import Strip
from ...infdit_core.memory.adaptive import Adaptive
from ...infdit_core.memory.planner import Workload
from ...infdit_core.pictures.prepare import Canvas
from ...infdit_core.resume import digest
from ...infdit_core.sampling import Preset
from ...infdit_core.scratch import Scratch
from ...infdit_core.upscale import Sampler
from .casting import CastingInfDiT
from .comfy_model import (
    MEMORY,
    REUSE_LAYERS,
    SCHEDULE,
    compile_errors_named,
    compiler_of,
    interruptible,
)
from .folder_progress import FolderProgress
from .patches import require_own_solver
from .runs import PlannedRun, wanted_bytes


@dataclass
class ManagedSampler(Sampler):
    """A `Sampler` that draws as `infdit upscale` does, with a MODEL of ComfyUI."""

    patcher: Any = None
    """The `ModelPatcher` of `model`."""
    report: FolderProgress | None = None
    """Told of every pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        network = cast("CastingInfDiT", self.model)
        network.placed = self.patcher.load_device, self.patcher.model.get_dtype_inference()

    def prepare(self, canvas: Canvas) -> Canvas:
        with self._loaded(canvas):
            return super().prepare(canvas)

    def __call__(self, canvas: Canvas) -> Tensor:
        if self.report is not None:
            self.report.begin(canvas)
        with self._loaded(canvas), compile_errors_named():
            return super().__call__(canvas)

    def plan(self, canvas: Canvas, strip: Strip | None = None) -> Adaptive:
        """The leanest of the schedules that are fast, in the memory that ComfyUI has free."""
        work = self._workload(canvas, strip)
        return self.new_run().planned(work, self.device, self.memory_bytes)

    def new_run(self) -> PlannedRun:
        run = PlannedRun()
        run.patcher, run.progress = self.patcher, self.progress
        return run

    def weights_digest(self) -> str:
        """Of weights without patches, and of the patches, which ComfyUI applies when it likes."""
        patcher = self.patcher
        weights = patcher.model_state_dict()
        weights |= {key: backup.weight for key, backup in patcher.backup.items()}
        given = {"weights": weights, "patches": patcher.patches, "objects": patcher.object_patches}
        return digest(dict(_tensors("", given)))

    def _workload(self, canvas: Canvas, strip: Strip | None = None) -> Workload:
        return replace(super()._workload(canvas, strip), weights=False)

    @contextmanager
    def _loaded(self, canvas: Canvas) -> Iterator[None]:
        """With the weights where ComfyUI wants them, and memory beside them for a canvas."""
        patcher, device = self.patcher, self.device
        needed = wanted_bytes(self._workload(canvas), patcher.model_size(), device)
        comfy.model_management.load_models_gpu([patcher], memory_required=needed)
        with comfy.model_management.cuda_device_context(device):
            patcher.pre_run()
            try:
                options = patcher.model_options.get("transformer_options", {})
                patcher.model.diffusion_model.compile_for(options, compiler_of(patcher))
                yield
            finally:
                patcher.cleanup()


def managed_sampler(
    patcher: comfy.model_patcher.ModelPatcher,
    preset: Preset,
    seed: int,
    denoise: float,
    scratch: Scratch,
    report: FolderProgress,
) -> ManagedSampler:
    """The sampler of a MODEL, with what Inf-DiT Schedule says on it.

    Raises:
        InfDiTError: something is on the model that would have no effect here.
    """
    require_own_solver(patcher)
    options = patcher.model_options.get("transformer_options", {})
    return ManagedSampler(
        patcher.model.infdit,
        preset,
        seed,
        denoise,
        options.get(SCHEDULE),
        options.get(MEMORY),
        options.get(REUSE_LAYERS, 0),
        progress=interruptible(report.cells),
        scratch=scratch,
        patcher=patcher,
        report=report,
    )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in containers and ComfyUI's adapters; other values as names of empty ones."""
    if isinstance(value, QuantizedTensor):
        value = value.dequantize()
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(f"{name}/{key}", each)
    elif isinstance(value, list | tuple):
        for n, each in enumerate(value):
            yield from _tensors(f"{name}/{n}", each)
    elif hasattr(value, "weights"):
        yield from _tensors(f"{name}/{type(value).__qualname__}", value.weights)
    else:
        plain = value is None or isinstance(value, str | int | float)
        what = value if plain else getattr(value, "__qualname__", type(value).__qualname__)
        yield f"{name}={what}", torch.empty(0)
