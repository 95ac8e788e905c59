"""Which pictures the command line makes, and how each ended."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InfDiTError
from ..pictures.files import READABLE

_SHOWN = 10


class CommandError(InfDiTError):
    """Something the user asked for that cannot be done."""


@dataclass
class Jobs:
    """What is to be done, and what is left alone because it is there already."""

    todo: list[tuple[Path, Path]] = field(default_factory=list)
    """Every picture with the file of its result."""
    finished: list[Path] = field(default_factory=list)
    """Results of an earlier run."""
    single: bool = False
    """Whether one picture was asked for by its name."""


def plan_jobs(inputs: list[Path], output: Path, suffix: str, overwrite: bool) -> Jobs:
    """Every picture with the file of its result, none of which may be in the way of another.

    Of several pictures, those whose result exists are finished: a run that was cut off goes on.

    Raises:
        CommandError: a picture is missing, or two results would have one name, or a result would
            replace an input, or the one result asked for exists.
    """
    sources = _sources(inputs)
    single = len(inputs) == 1 and not inputs[0].is_dir()
    if output.suffix and not output.is_dir():
        if not single:
            raise CommandError(f"{output} is one file; expected a folder for several pictures")
        targets = [output]
    else:
        targets = [output / f"{source.stem}.{suffix}" for source in sources]
    # By identity: on some systems names that differ in case mean one file.
    originals = {_identity(source) for source in sources}
    jobs = Jobs(single=single)
    for target, times in Counter(targets).items():
        if times > 1:
            raise CommandError(f"{times} pictures would be written to {target}; rename them")
        if target.exists() and _identity(target) in originals:
            raise CommandError(f"{target} is an input; expected another --output")
    for source, target in zip(sources, targets, strict=True):
        if overwrite or not target.exists():
            jobs.todo.append((source, target))
        elif target.is_file() and not single:
            jobs.finished.append(target)
        else:
            raise CommandError(f"{target} already exists; expected another --output or --overwrite")
    return jobs


def _sources(inputs: list[Path]) -> list[Path]:
    sources: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in READABLE and not p.name.startswith(".")
            )
            if not found:
                raise CommandError(
                    f"{path} holds no picture; expected {', '.join(sorted(READABLE))}"
                )
            sources += found
        elif path.exists():
            sources.append(path)
        else:
            raise CommandError(f"{path} does not exist; expected a picture or a folder")
    return sources


def summary(failed: list[Path], jobs: Jobs) -> str:
    """What went wrong in a run over several pictures."""
    names = ", ".join(path.name for path in failed[:_SHOWN])
    more = f" and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return f"{len(failed)} of {len(jobs.todo)} pictures could not be upscaled: {names}{more}"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what it was made from, says that nothing more can be written."""
    cause = error.__cause__ or error
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
