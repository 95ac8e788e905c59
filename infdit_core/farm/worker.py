"""What a process of the farm does with a picture."""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cli.commands import Upscaler, chosen_schedule, read_picture
from ..cli.common import choose_device
from ..cli.jobs import CommandError, Size, is_disk_full, reason_of
from ..errors import InfDiTError
from ..memory.adaptive import is_out_of_memory, memory_budget
from ..memory.planner import Workload, peak_bytes, plans, small_plan
from ..pictures.prepare import target_size
from .places import Place

_PROCESS_BYTES = 600e6
"""Of a worker before it loads a model: Python, torch and Ray; 417 MB were seen, on Linux."""

_RESULT_BYTES_PER_PX = 3 * 4
"""Float32 RGB."""
_RESULTS_ON_HOST = 4
"""Beside a GPU: the prepared picture, the noise, the samples and the result."""

MADE, THERE, AGAIN, FAILED = "made", "there", "again", "failed"
"""How work on a picture may end: `AGAIN` failed and may be tried another time."""
TOO_LARGE, STOP = "too large", "stop"
"""It wants a larger worker; or no other picture would end better."""


class Outcome(NamedTuple):
    """How the work on a picture ended."""

    source: str
    """Its path below the folder that is read."""
    state: str
    reason: str = ""
    """Why there is no result."""
    needed_bytes: int = 0
    """RAM that a picture wants that is too large for this worker."""


class _TooLargeError(InfDiTError):
    def __init__(self, needed: float) -> None:
        super().__init__(needed)
        self.needed = int(needed)


class Worker:
    """Makes the results of pictures with the options of the command line, as `infdit upscale` does.

    Nothing that goes wrong with a picture is raised: it is its outcome.

    Args:
        options: of the command line, by name.
        source, target: folders or URLs, see `Place`.
        memory_bytes: RAM that this process may take.
        begin: called with a picture before the work on it; returns how often that has happened,
            which is more than once if processes died of it.
    """

    def __init__(
        self,
        options: dict[str, Any],
        source: str,
        target: str,
        memory_bytes: float = math.inf,
        begin: Callable[[str], int] = lambda _: 1,
    ) -> None:
        self.args = argparse.Namespace(**options)
        self.source, self.target = Place(source), Place(target)
        self.memory_bytes, self._begin = memory_bytes, begin
        self._most = self.args.memory
        torch.set_num_threads(self.args.cpus_per_actor)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Ray Data's form: columns of pictures to columns of outcomes."""
        pairs = zip(batch["source"], batch["target"], strict=True)
        rows = [self.work(str(source), str(target)) for source, target in pairs]
        return {name: [getattr(row, name) for row in rows] for name in Outcome._fields}

    def work(self, source: str, target: str) -> Outcome:
        """Make one result, unless it is there.

        Args:
            source, target: paths below the folders.
        """
        try:
            if not self.args.overwrite and self.target.exists(Path(target)):
                return Outcome(source, THERE)
            times = self._begin(source)
            if times > 1 + self.args.retries:
                reason = f"the worker's process died {times - 1} times in the work on it"
                return Outcome(source, FAILED, reason)
            self._make(Path(source), Path(target))
            return Outcome(source, MADE)
        except FileExistsError:  # by a worker that was thought to be dead
            return Outcome(source, THERE)
        except _TooLargeError as error:
            return Outcome(source, TOO_LARGE, needed_bytes=error.needed)
        except Exception as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                os._exit(1)  # nothing works any more in this process; Ray starts another
            state = STOP if is_disk_full(error) or isinstance(error, _CannotWorkError) else AGAIN
            return Outcome(source, state, self._reason(error, self.source.of(Path(source))))

    def _make(self, source: Path, target: Path) -> None:
        upscaler = self.upscaler
        with tempfile.TemporaryDirectory(prefix="infdit-") as scratch:
            read, written = Path(scratch, "in"), Path(scratch, "out")
            read.mkdir()
            written.mkdir()
            overwrite = self.args.overwrite
            with (
                self.source.reading(source, read) as file,
                self.target.writing(target, written, overwrite=overwrite) as result,
            ):
                job = read_picture(file, result, self._result_size, self.args)
                upscaler.make(job, file, result)

    @cached_property
    def upscaler(self) -> Upscaler:
        """The model, loaded for the first picture."""
        try:
            if count := self.args.gpus_per_actor:
                choose_device("cuda")  # says why there is none
                return Upscaler(self.args, *(torch.device("cuda", n) for n in range(count)))
            return Upscaler(self.args, choose_device("cpu"))
        except (InfDiTError, OSError, ImportError) as error:
            reason = reason_of(error, self.args.model)
            raise _CannotWorkError(f"{reason} (on {platform.node()})") from error

    def _result_size(self, source: Size) -> Size:
        size = target_size(source, self.args.scale, self.args.size)
        self._require_share(size)
        return size

    def _require_share(self, size: Size) -> None:
        """Plan a result within this process's share of the RAM.

        Raises:
            _TooLargeError: it wants more.
        """
        model = self.upscaler.model
        work = Workload(model.config, *size, model.dtype, device=model.device.type)
        work = replace(work, residual=bool(self.args.reuse_layers))
        picture = math.prod(size) * _RESULT_BYTES_PER_PX
        if work.device == "cpu":  # the plan counts the solver's pictures; the result is one more
            beside = _PROCESS_BYTES + picture
            limit = min(self._most or math.inf, self.memory_bytes - beside)
            needed = self._least(work, limit)
            if needed > limit:
                raise _TooLargeError(needed + beside)
            self.args.memory = min(limit, memory_budget(model))
            return
        beside = _PROCESS_BYTES + _RESULTS_ON_HOST * picture
        budget = self._most or memory_budget(model)
        found = plans(work) if not small_plan(work, budget) else ()
        waiting = min((p.host_bytes for p in found if p.peak_bytes <= budget), default=0)
        if beside + waiting > self.memory_bytes:
            raise _TooLargeError(beside + waiting)

    def _least(self, work: Workload, limit: float) -> float:
        """Bytes of the leanest order of computation that was asked for; 0 where it surely fits."""
        if schedule := chosen_schedule(self.args):
            return peak_bytes(work, schedule)
        if limit > 0 and small_plan(work, limit):
            return 0
        return min(plan.peak_bytes for plan in plans(work))

    def _reason(self, error: Exception, name: str) -> str:
        if isinstance(error, InfDiTError | OSError | MemoryError) or is_out_of_memory(error):
            return reason_of(error, name)
        return f"{name}: {''.join(traceback.format_exception(error)).rstrip()}"


class _CannotWorkError(CommandError):
    """What no picture can be made with here."""
