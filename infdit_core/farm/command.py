"""`infdit farm`: a folder over all workers of this machine or a cluster."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from ..cli.commands import check_schedule
from ..cli.common import say, warn
from ..cli.jobs import CommandError, Jobs, find_clashes, make_folder, plan_jobs, result_names
from ..memory.host import gigabytes
from ..pictures.files import READABLE, check_writable
from ..pictures.wrap import check_wrap
from .cluster import Cluster
from .places import Place
from .worker import AGAIN, FAILED, STOP, TOO_LARGE, Outcome


def farm_pictures(args: argparse.Namespace) -> int:
    """Upscale the pictures of a folder, and tell at the end which of them failed and why."""
    check_schedule(args)
    check_wrap(args.wrap, args.colour_fix)
    check_writable(Path(f"result.{args.format}"), alpha=False, bit_depth=args.bit_depth)
    args.model = Path(os.path.abspath(args.model))
    source, target = Place(args.source), Place(args.target)
    jobs = plan(source, target, args)
    if jobs.finished:
        warn(f"{len(jobs.finished)} results are there already; --overwrite replaces them")
    if jobs.todo:
        if target.folder:
            make_folder(target.folder)
        with Cluster(args) as cluster:
            _run(jobs, cluster, source, args)
    if jobs.failed:
        raise CommandError(jobs.summary())
    return 0


def plan(source: Place, target: Place, args: argparse.Namespace) -> Jobs:
    """Every picture with its result, named as `plan_jobs` names them, by paths below the folders.

    Raises:
        CommandError: there is nothing to do, or `target` cannot be used.
    """
    here, there = source.folder, target.folder
    if here and not here.is_dir():
        raise CommandError(f"{source} is no folder; expected a folder of pictures")
    if here and there:
        jobs = plan_jobs(
            [here],
            there,
            args.format,
            args.overwrite,
            recursive=args.recursive,
            debug=args.debug,
            tell=warn,
        )
        jobs.todo = [(a.relative_to(here), b.relative_to(there)) for a, b in jobs.todo]
        return jobs
    jobs = Jobs(warn, debug=args.debug)
    found, base = source.search(args.recursive), here or Path()
    if line := found.left_out(base, str(source)):
        warn(line)
    for folder, error in found.unreadable.items():
        with jobs.attempt(folder, alone=folder == here):
            raise error
    pictures = [path.relative_to(base) for path in found.pictures]
    results = result_names(pictures, args.format, warn)
    clashes = find_clashes(results, there)
    present = set() if args.overwrite else target.present(results)
    for n, (picture, result) in enumerate(zip(pictures, results, strict=True)):
        if n in clashes:
            reason = f"another picture's result would be {target.of(result)} too"
            jobs.fail(Path(picture), f"{source.of(picture)}: {reason}")
        elif result in present:
            jobs.finished.append(result)
        else:
            jobs.todo.append((picture, result))
    jobs.total = len(jobs.todo) + len(jobs.failed)
    if not (jobs.total or jobs.finished):
        raise CommandError(f"{source} holds no picture; expected {', '.join(sorted(READABLE))}")
    return jobs


class Rounds:
    """What is left to do: again what failed, and with larger workers what is too large.

    Args:
        jobs: pictures by their paths below `source`.
        retries: how often a picture that failed is tried again.
        share, largest: bytes of RAM of a worker, and of the largest that there can be.
    """

    def __init__(self, jobs: Jobs, source: Place, retries: int, share: int, largest: int) -> None:
        self.pending = {picture.as_posix(): result.as_posix() for picture, result in jobs.todo}
        """Pictures of this round and their results."""
        self.share, self.done = share, 0
        self.failed: dict[str, str] = {}
        """Why there is no result of a picture and will be none."""
        self._results, self._source = self.pending, source
        self._retries, self._largest = retries, largest
        self._times, self._again = Counter[str](), list[str]()
        self._large: dict[str, int] = {}

    def note(self, outcome: Outcome) -> int:
        """Keep how the work on a picture ended; returns how many pictures are settled by that.

        Raises:
            CommandError: no other picture would end better.
        """
        name = outcome.source
        if outcome.state == STOP:
            raise CommandError(outcome.reason)
        if outcome.state == TOO_LARGE:
            self._large[name] = outcome.needed_bytes
            return 0
        self._times[name] += 1
        if outcome.state == AGAIN and self._times[name] <= self._retries:
            self._again.append(name)
            return 0
        if outcome.state in (AGAIN, FAILED):
            self.failed[name] = outcome.reason
        else:
            self.done += 1
        return 1

    def turn(self) -> int:
        """Go on to the next round; returns how many pictures are too large for any."""
        settled = 0
        if not self._again and self._large:
            least = min(self._large.values())
            self.share = min(max(2 * self.share, least), self._largest)
            self._again = [n for n, needed in self._large.items() if needed <= self._largest]
            for name in self._large.keys() - set(self._again):
                self.failed[name] = (
                    f"{self._source.of(Path(name))}: needs at least"
                    f" {gigabytes(self._large[name])} of RAM; the largest machine has"
                    f" {gigabytes(self._largest)} for the farm"
                )
                settled += 1
            self._large = {}
        self.pending, self._again = {name: self._results[name] for name in self._again}, []
        return settled


def _run(jobs: Jobs, cluster: Cluster, source: Place, args: argparse.Namespace) -> None:
    """Make what is to be done, and tell what failed at the end."""
    from tqdm import tqdm

    rounds = Rounds(jobs, source, args.retries, cluster.share, cluster.largest)
    try:
        with tqdm(total=len(rounds.pending), unit="picture", disable=None) as bar:
            while rounds.pending:
                for outcome in cluster.outcomes(rounds.pending, rounds.share):
                    bar.update(rounds.note(outcome))
                bar.update(rounds.turn())
    finally:
        for name, reason in rounds.failed.items():
            jobs.fail(Path(name), reason)
        say(f"{rounds.done} of {jobs.total} pictures made")
