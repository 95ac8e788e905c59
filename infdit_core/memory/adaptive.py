"""Evaluations that are tried again with less memory when it runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..blocks.schedules import Schedule
from ..network.model import InfDiT
from .host import PlanError, available_bytes
from .planner import Plan

_GPU_SHARE = 0.9
"""Of the free memory of a GPU that a run may take: the rest is for what is not counted, and for
fragments. Where the driver may use RAM in its place, taking all would be slow and not fail."""
_CLEARLY_SMALLER = 0.8
"""Share of a plan's memory that another may take to be worth trying first after it failed."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


_SAID_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
"""In what the CPU's allocator, CUDA's errors that come late, cuBLAS, cuDNN, MPS and XPU say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: only some backends raise `torch.OutOfMemoryError`."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in _SAID_OF_MEMORY)
    )


class Adaptive:
    """The fastest of several plans that fits, and on out of memory the next smaller one.

    An evaluation that fails is repeated with the smaller plan; what the sampler has done so far
    is kept, and so is the smaller plan for the evaluations that follow.

    Args:
        plans: the fastest first, as from `planner.plans`.
        memory_bytes: what may be taken; None for no limit. Where nothing fits, the smallest plan
            is tried all the same, because the estimate of free memory may be wrong.
        free_memory: called before another plan is tried, to give memory back to the device.
        is_oom: tells from an exception whether memory ran out.
        first: a plan that surely fits; then `plans`, a function that makes them, is called on out
            of memory only.
    """

    def __init__(
        self,
        plans: Sequence[Plan] | Callable[[], Sequence[Plan]],
        memory_bytes: float | None = None,
        free_memory: Callable[[], None] | None = None,
        is_oom: Callable[[BaseException], bool] = is_out_of_memory,
        first: Plan | None = None,
        host_bytes: float | None = None,
    ) -> None:
        self._make_plans = plans if callable(plans) else lambda: plans
        self._host_bytes = math.inf if host_bytes is None else host_bytes
        self._free_memory, self._is_oom = free_memory or _free_cuda_memory, is_oom
        self.plan = first or self._fastest(memory_bytes)
        """The plan in use."""

    def _fastest(self, memory_bytes: float | None) -> Plan:
        found = self._allowed()
        if not found:
            raise PlanError("expected at least one plan, got none")
        fitting = [p for p in found if memory_bytes is None or p.peak_bytes <= memory_bytes]
        return fitting[0] if fitting else min(found, key=lambda p: p.peak_bytes)

    def call(self, evaluate: Callable[[Schedule], T]) -> T:
        """What `evaluate` returns with the schedule of the plan, or of a smaller one."""
        # Smaller plans are tried outside the except block: its traceback holds the tensors.
        while True:
            try:
                return evaluate(self.plan.schedule)
            except (RuntimeError, MemoryError) as error:
                if not self._is_oom(error):
                    raise
                failure = error.with_traceback(None)
            if not self.shrink():
                raise failure
            del failure

    def shrink(self) -> bool:
        """Take the next smaller plan, after out of memory; False if there is none."""
        smaller = self._smaller(_CLEARLY_SMALLER) or self._smaller(1.0)
        if not smaller:
            return False
        self._free_memory()
        logger.warning("Inf-DiT: out of memory with %s; going on with %s", self.plan, smaller[0])
        self.plan = smaller[0]
        return True

    def _allowed(self) -> list[Plan]:
        return [p for p in self._make_plans() if p.host_bytes <= self._host_bytes]

    def _smaller(self, share: float) -> list[Plan]:
        peak, pictures = share * self.plan.peak_bytes, self.plan.schedule.pictures_device
        # the solver's pictures stay where they are
        return [
            p
            for p in self._allowed()
            if p.peak_bytes < peak and p.schedule.pictures_device == pictures
        ]


def memory_budget(net: InfDiT) -> float:
    """Bytes that a run may take on the network's device, its weights there included."""
    device = net.device
    held = sum(p.nbytes for p in net.parameters() if p.device == device)
    if device.type != "cuda":
        return available_bytes() + held
    # what torch keeps for its next tensors is free to us
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + cached) + held


def _free_cuda_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
