"""`infdit upscale --gpus N`: a process for each GPU, started and watched by torchrun's launcher."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InfDiTError
from ..memory.adaptive import is_out_of_memory
from .common import UsageError, warn
from .jobs import CommandError

_TRIES = 3
"""Runs with less and less memory, where it runs out."""
_SMALLER = 0.7
"""Of the memory of the try before."""
_ROOT_CAUSES = ("memory", "mendable", "interrupted", "bug")
"""What a process says it failed of; others fail of that, which they call a bug."""

Work = Callable[[argparse.Namespace], int]
_logger = logging.getLogger("torch.distributed.elastic")


@dataclass
class Ranks:
    """What the processes of one run know of each other."""

    folder: Path
    """Where they say what they have finished, and what they have failed of."""
    count: int
    memory_share: float
    """Of the memory that a plan would take."""
    done: frozenset[str]
    """Results that earlier tries have finished."""
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the results and talks."""
        return self.rank == 0

    def finish(self, target: Path) -> None:
        """Keep in mind that a result is written."""
        with (self.folder / "finished").open("a", encoding="utf-8") as file:
            file.write(json.dumps(str(target)) + "\n")

    def finished(self) -> frozenset[str]:
        """The results of all tries."""
        path = self.folder / "finished"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return self.done | {json.loads(line) for line in lines}

    def fail(self, error: BaseException) -> None:
        """Say what this process failed of."""
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if (kind := _kind(error)) == "bug":
            text = "".join(traceback.format_exception(error))
        path = self.folder / f"failed-{self.rank}"
        path.write_text(json.dumps([kind, text]), encoding="utf-8")

    def failure(self) -> tuple[str, str] | None:
        """Kind and text of what failed, of several the cause of the others."""
        said = [json.loads(path.read_text()) for path in sorted(self.folder.glob("failed-*"))]
        said.sort(key=lambda one: _ROOT_CAUSES.index(one[0]))
        return (said[0][0], said[0][1]) if said else None


def run_on_ranks(work: Work, args: argparse.Namespace) -> int:
    """Do `work` in `args.gpus` processes; in each, `args.ranks` says which it is.

    Where one fails the others are ended. Where memory runs out all begin again with less, at the
    first result that is not there.

    Raises:
        CommandError: what the process said that failed first, or how it died.
        KeyboardInterrupt: the run was cancelled.
    """
    _check(args)
    done: frozenset[str] = frozenset()
    for n in range(_TRIES):
        with tempfile.TemporaryDirectory(prefix="infdit") as folder:
            args.ranks = Ranks(Path(folder), args.gpus, _SMALLER**n, done)
            died = _launch(work, args)
            done, failure = args.ranks.finished(), args.ranks.failure()
        if died is None:
            return 0
        kind, text = failure or ("died", died)
        if kind == "interrupted":
            raise KeyboardInterrupt
        if kind != "memory" or n + 1 == _TRIES:
            break
        warn(f"{text}; all go on with less")
    if kind == "bug" and args.debug:
        warn(text)
    raise CommandError(text.strip().splitlines()[-1])


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go with several processes, and GPUs that are not there."""
    if args.schedule == "block-major":
        raise UsageError("--gpus goes with --schedule auto, full or layer-major")
    if args.scratch is not None:
        raise UsageError("--gpus goes without --scratch")
    if args.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--gpus goes with --device cuda or cpu, got {args.device}")
    if args.device != "cpu" and args.gpus > (found := torch.cuda.device_count()):
        raise CommandError(f"--gpus {args.gpus}: expected as many CUDA devices, found {found}")


def _launch(work: Work, args: argparse.Namespace) -> str | None:
    """Run the processes; None if all went well, else how one of them died."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=args.gpus,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=args.ranks.folder.name,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    _logger.setLevel(logging.CRITICAL)  # it tells of every failure what we tell once
    try:
        elastic_launch(config, _rank)(work, args)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        killed = {r: -c for r, c in codes.items() if c < 0 and -c != signal.SIGTERM}
        for rank, number in killed.items():
            name = signal.Signals(number).name
            path = args.ranks.folder / f"failed-{rank}"
            path.write_text(json.dumps(["mendable", f"the process of GPU {rank} died of {name}"]))
        return f"processes ended with {codes}"
    except SignalException as error:
        raise KeyboardInterrupt from error
    return None


def _rank(work: Work, args: argparse.Namespace) -> int:
    """One of the processes."""
    import torch.distributed as dist

    ranks: Ranks = args.ranks
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    ranks.rank = dist.get_rank()
    if not ranks.first:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end
    try:
        if args.device == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks.count))
        else:
            args.device = f"cuda:{ranks.rank}"
            torch.cuda.set_device(ranks.rank)
        return work(args)
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def _kind(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    usual: Any = (InfDiTError, OSError, ImportError, UsageError)
    return "mendable" if isinstance(error, usual) else "bug"
