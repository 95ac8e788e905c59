"""What one sampling keeps between its evaluations: plan, memory of the host, LR keys and values."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import comfy.model_management
import comfy.model_patcher
import torch

from ...infdit_core.blocks.grid import Strip
from ...infdit_core.blocks.host_buffer import HostBuffer, Unpin
from ...infdit_core.blocks.schedules import Schedule
from ...infdit_core.memory.adaptive import Adaptive, is_out_of_memory
from ...infdit_core.memory.host import waiting_bytes
from ...infdit_core.memory.planner import (
    Plan,
    Workload,
    check_host,
    lean_plan,
    plans,
    small_plan,
)
from ...infdit_core.network.model import InfDiT
from ...infdit_core.network.residual_cache import ResidualCache
from ...infdit_core.network.run import Run
from ...infdit_core.pictures.prepare import Wrap

_GPU_SHARE = 0.9
"""Of what is free on a GPU that a run may take: where the driver may use RAM in place of what is
missing, taking all would be slow and not fail."""
_FAST_COST = 1.1
"""A plan is fast if it takes at most this much more time than the fastest."""
_PICTURES_TO_COME = 4
"""Of the solver, float32, that may not be there yet at the first evaluation."""


def workload(net: InfDiT, shape, dtype, device) -> Workload:
    """An evaluation of x (B, 3, H, W); weights and pictures are ComfyUI's to count."""
    batch, _, height, width = shape
    kind = torch.device(device).type
    return Workload(net.config, height, width, dtype, batch, kind, weights=False, pictures=0)


def wanted_bytes(work: Workload, weights: int, device: torch.device) -> int:
    """Bytes that sampling should find free: those of the leanest schedule that is fast.

    Of a leaner one where the GPU has less beside the weights: ComfyUI would keep none there.

    Args:
        weights: bytes of the model.
    """
    management = comfy.model_management
    if work.device == "cpu":
        small = small_plan(work, management.get_free_memory(device))
        if small is not None:
            return small.peak_bytes
    ram = waiting_bytes()
    found = [p for p in plans(work) if p.host_bytes <= ram]
    leanest = min(found, key=lambda p: p.peak_bytes)
    fast = [p for p in found if p.cost <= _FAST_COST] or [leanest]
    wanted = min(fast, key=lambda p: p.peak_bytes)
    if work.device != "cpu":
        room = _GPU_SHARE * management.get_total_memory(device)
        room -= 1.1 * weights + management.extra_reserved_memory()  # as core reckons
        if wanted.peak_bytes > room:
            wanted = next((p for p in found if p.peak_bytes <= room), leanest)
    return wanted.peak_bytes


class PlannedRun(Run):
    """A sampling run that is planned at its first evaluation."""

    adaptive: Adaptive | None = None
    patcher: comfy.model_patcher.ModelPatcher | None = None
    """Of the model; None where ComfyUI has not loaded it."""

    def __init__(self) -> None:
        super().__init__()
        self.host = HostBuffer(_pin)

    def plan(
        self,
        net: InfDiT,
        x: torch.Tensor,
        memory_bytes: float | None,
        strip: Strip | None = None,
    ) -> Adaptive:
        """The fastest schedule for x (B, 3, H, W), or a strip of a picture, that fits."""
        if self.adaptive is None:
            work = workload(net, x.shape, x.dtype, x.device)
            work = replace(work, residual=self.cache is not None)
            if strip is not None:
                work = replace(work, strip_of_columns=strip.grid.by_columns)
            self.adaptive = self.planned(work, x.device, memory_bytes)
        return self.adaptive

    def planned(self, work: Workload, device: torch.device, memory_bytes: float | None) -> Adaptive:
        """The fastest schedule that fits; with pictures in files the leanest that is fast."""
        free, ram = memory_bytes or self._budget(work, device), waiting_bytes()
        if work.scratch:
            found = self._plans(work)
            first = lean_plan(found, free, ram)
        else:
            found, first = partial(self._plans, work), small_plan(work, free)
        empty_cache = comfy.model_management.soft_empty_cache
        adaptive = Adaptive(found, free, empty_cache, ran_out_of_memory, first, ram)
        logging.info("Inf-DiT: %d×%d px, %s", work.width, work.height, adaptive.plan)
        return adaptive

    def _plans(self, work: Workload) -> list[Plan]:
        """The fastest first; those by layers first where the weights come when they are used.

        A layer's weights come once for all chunks that it computes in turn, and by blocks that is
        one: at 8192² they would come a hundred times in an evaluation.
        """
        found = list(plans(work))
        if self.patcher is not None and self.patcher.loaded_size() < self.patcher.model_size():
            layers = work.config.num_layers
            found.sort(key=lambda p: p.schedule.residency(work.grid, layers).turn > 0)
        return found

    def _budget(self, work: Workload, device: torch.device) -> float:
        """Bytes that an evaluation may take on its device."""
        free = (self.patcher or comfy.model_management).get_free_memory(device)
        if device.type == "cpu":
            return free
        if self.patcher is not None and self.patcher.is_dynamic():
            free -= self.patcher.model_size()  # weights that may go count as free, ours among them
        return _GPU_SHARE * free - replace(work, pictures=_PICTURES_TO_COME).picture_bytes

    def check(self, net: InfDiT, x: torch.Tensor, schedule: Schedule) -> None:
        """Refuse a schedule that the user chose, at first, where the RAM is too small for it."""
        if schedule is not self._checked:
            check_host(workload(net, x.shape, x.dtype, x.device), schedule)
            self._checked = schedule

    _checked: Schedule | None = None


def _pin(memory: torch.Tensor, device: torch.device) -> Unpin | None:
    """Pin memory by ComfyUI, which keeps count of it and knows --disable-pinned-memory."""
    if not comfy.model_management.pin_memory(memory):
        return None
    return partial(comfy.model_management.unpin_memory, memory)


class Runs:
    """The sampling run of each device, with the plan and the LR picture's keys and values.

    Args:
        noise: the object that a sampling has of its own.
        lr: the LR picture.
        hooks: ComfyUI's hooks on the condition, or None.
    """

    def __init__(self, noise: torch.Tensor, lr: torch.Tensor, hooks: object) -> None:
        self._noise, self._lr = weakref.ref(noise), lr
        self._hooked = hooks is not None
        self._by_device: dict[torch.device, PlannedRun] = {}
        self.patcher: comfy.model_patcher.ModelPatcher | None = None
        """Of the model; None where ComfyUI has not loaded it."""

    def are_of(self, noise: torch.Tensor, lr: torch.Tensor, hooks: object) -> bool:
        if self._noise() is not noise or self._hooked or hooks is not None:
            return False
        return self._lr.shape == lr.shape and torch.equal(self._lr, lr)

    def on(
        self, device: torch.device, patcher: comfy.model_patcher.ModelPatcher | None = None
    ) -> PlannedRun:
        """Of a device, and of the clone of the model there."""
        if (run := self._by_device.get(device)) is None:
            run = self._by_device[device] = PlannedRun()
        run.patcher = patcher or self.patcher
        if self._hooked:  # they change weights, and by step
            run.lr_kv = None
        return run


@dataclass(eq=False)
class ConditionState:
    """What a condition has of its own in a sampling, and what it shares with others."""

    runs: Runs
    caches: dict[torch.device, ResidualCache] = field(default_factory=dict)
    """By device, where layers are left out."""
    compiler: str | Callable | None = None
    """The backend that core's node TorchCompileModel asks for; None for no such node."""
    wrap: Wrap | None = None
    base: torch.Tensor | None = None
    """(B, 3, H, W) the prior's picture in full precision; None for a model without a prior."""


def ran_out_of_memory(error: BaseException) -> bool:
    # core's comes first: it clears an error that CUDA reports late
    return comfy.model_management.is_oom(error) or is_out_of_memory(error)
