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
from .worker import AGAIN, STOP, TOO_LARGE


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


def _run(jobs: Jobs, cluster: Cluster, source: Place, args: argparse.Namespace) -> None:
    """Make what is to be done: in rounds, for what failed and for what needs larger workers."""
    from tqdm import tqdm

    pending = {picture.as_posix(): result.as_posix() for picture, result in jobs.todo}
    results, times, failed = dict(pending), Counter[str](), dict[str, str]()
    large: dict[str, int] = {}
    share, done = cluster.share, 0
    try:
        with tqdm(total=len(pending), unit="picture", disable=None) as bar:
            while pending:
                again: list[str] = []
                for outcome in cluster.outcomes(pending, share):
                    name = outcome.source
                    if outcome.state == STOP:
                        raise CommandError(outcome.reason)
                    if outcome.state == TOO_LARGE:
                        large[name] = outcome.needed_bytes
                        continue
                    times[name] += 1
                    if outcome.state == AGAIN and times[name] <= args.retries:
                        again.append(name)
                        continue
                    if outcome.reason:
                        failed[name] = outcome.reason
                    else:
                        done += 1
                    bar.update()
                if not again and large:
                    most = cluster.largest
                    for name in [name for name, needed in large.items() if needed > most]:
                        failed[name] = (
                            f"{source.of(Path(name))}: needs at least {gigabytes(large.pop(name))}"
                            f" of RAM; the largest machine has {gigabytes(most)} for the farm"
                        )
                        bar.update()
                    if large:
                        share = min(max(2 * share, min(large.values())), most)
                    again, large = [*large], {}
                pending = {name: results[name] for name in again}
    finally:
        for name, reason in failed.items():
            jobs.fail(Path(name), reason)
        say(f"{done} of {jobs.total} pictures made")
