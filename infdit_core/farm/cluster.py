"""Ray: this machine's own cluster for the time of a run, or one that is there."""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from ..cli.jobs import CommandError
from ..memory.host import gigabytes
from .worker import Outcome, Worker

_MOST_BLOCKS = 10_000
"""Pieces that a round's pictures are dealt out in: of more the bookkeeping would take long."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's own choice is a third of the RAM; only names go through it here."""
_LONGEST_FOLDER = 40
"""Letters of a folder for Ray's sockets, whose whole paths may have about 100."""


def _ledger() -> type:
    """A class that is sent by value, since it is local: its process need not import torch."""

    class Ledger:
        """How often the work on each picture was begun, whatever became of the process."""

        def __init__(self) -> None:
            self._times: dict[str, int] = {}

        def begin(self, source: str) -> int:
            self._times[source] = self._times.get(source, 0) + 1
            return self._times[source]

    return Ledger


class Cluster:
    """The machines of a farm, as a context.

    Raises:
        CommandError: Ray is not installed, or no machine has what a worker needs.
        ConnectionError: nothing is at the address.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._folder: str | None = None
        self.share = 0
        """Bytes of RAM of a worker."""
        self.largest = 0
        """Bytes of RAM of the largest machine that can hold a worker."""

    def __enter__(self) -> Cluster:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # these are read when Ray is imported
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        if not self.args.address and "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"  # nobody else's processes may give it work
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise CommandError(
                "infdit farm needs Ray, which is not installed; expected"
                f' pip install "comfyui-infdit[farm]" ({error})'
            ) from error
        self._ray = ray
        try:
            self._start()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._choose(nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.args.address:
            self._ray.init(self.args.address, **quiet)
        else:
            self._folder = tempfile.mkdtemp(prefix="infdit-", dir=_short_folder())
            self._ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=self._folder,
                **quiet,
            )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one of ours
        context.print_on_execution_start = False

    def _choose(self, nodes: list[dict[str, float]]) -> None:
        """Say what a worker is, from the resources of the machines."""
        args, self._nodes = self.args, nodes
        if args.gpus_per_actor is None:
            args.gpus_per_actor = int(any(node.get("GPU") for node in nodes))
        holding = [(node["memory"], n) for node in nodes if (n := self._room(node))]
        if not holding:
            kind, count = ("GPU", args.gpus_per_actor) if args.gpus_per_actor else ("CPU", 0)
            raise CommandError(
                f"no machine of the farm has {count or args.cpus_per_actor} {kind}s for a worker"
            )
        self.largest = int(max(memory for memory, _ in holding))
        most = args.workers or math.inf
        self.share = int(min(memory / min(n, most) for memory, n in holding))
        if args.memory_per_actor:
            self.share = int(args.memory_per_actor)
        if self.share > self.largest:
            raise CommandError(
                f"--memory-per-actor: the largest machine has {gigabytes(self.largest)} for the"
                f" farm, got {gigabytes(self.share)}"
            )

    def _room(self, node: dict[str, float]) -> int:
        """Number of workers that the processors of a machine can serve."""
        if self.args.gpus_per_actor:
            return int(node.get("GPU", 0) // self.args.gpus_per_actor)
        return int(node.get("CPU", 0) // self.args.cpus_per_actor)

    def workers(self, share: int) -> int:
        """How many workers with so many bytes of RAM the machines have room for."""
        room = sum(min(self._room(node), int(node["memory"] // share)) for node in self._nodes)
        return min(room, self.args.workers or room)

    def outcomes(self, pairs: dict[str, str], share: int) -> Iterator[Outcome]:
        """Work on pictures, and tell of each how it ended, in any order.

        Args:
            pairs: pictures and their results, by paths below the folders.
            share: bytes of RAM of each worker.

        Raises:
            CommandError: the cluster has failed.
        """
        ray, args, count = self._ray, self.args, self.workers(share)
        here = ray.get_runtime_context().get_node_id()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        ledger = ray.remote(_ledger()).options(num_cpus=0, scheduling_strategy=strategy).remote()
        options = {k: v for k, v in vars(args).items() if k != "command"}
        places = args.source, args.target
        rows = [{"source": source, "target": target} for source, target in pairs.items()]
        resources: dict[str, Any] = {"num_cpus": args.cpus_per_actor}
        if args.gpus_per_actor:
            resources = {"num_gpus": args.gpus_per_actor}
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
        data = data.map_batches(
            Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=min(count, len(rows)),
                max_size=args.workers,  # else the farm grows with its cluster
                max_tasks_in_flight_per_actor=1,  # none waits behind one while another is idle
            ),
            fn_constructor_args=(options, *places, share, _Begin(ledger)),
            memory=share,
            **resources,
        )
        try:
            for row in data.iter_rows():
                yield Outcome(**row)
        except ray.exceptions.RayError as error:
            if args.debug:
                raise
            reason = str(error).strip().splitlines()[-1]
            raise CommandError(
                f"the farm stopped: {reason}; the same command goes on where it was"
            ) from error
        finally:
            ray.kill(ledger)


class _Begin:
    """Asks the ledger, from a worker."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def __call__(self, source: str) -> int:
        import ray

        return ray.get(self._ledger.begin.remote(source))


def _short_folder() -> str | None:
    """The folder for temporary files, or another where its name is too long for sockets."""
    folder = tempfile.gettempdir()
    return "/tmp" if len(folder) > _LONGEST_FOLDER and os.path.isdir("/tmp") else folder  # noqa: S108 - a folder of our own in it
