"""Which pictures the command line makes, and how each ended."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from torch import Tensor

from ..errors import InfDiTError
from ..pictures.files import (
    READABLE,
    ImageInfo,
    check_writable,
    fitting,
    has_alpha,
    picture_size,
    read_image,
)
from ..upscale import check_scratch
from .sources import identity, search, shown

_SHOWN = 10

Size = tuple[int, int]
"""(height, width) in pixels."""


class CommandError(InfDiTError):
    """Something the user asked for that cannot be done."""


@dataclass
class Jobs:
    """What is to be done, what is there already, and what failed."""

    tell: Callable[[str], None]
    """Called with a line for the user."""
    single: bool = False
    """Whether one picture was asked for by its name: its failure is the end."""
    debug: bool = False
    """Whether the first failure is the end."""
    todo: list[tuple[Path, Path]] = field(default_factory=list)
    """Every picture with the file of its result."""
    finished: list[Path] = field(default_factory=list)
    """Results of an earlier run."""
    failed: dict[Path, str] = field(default_factory=dict)
    """Pictures that could not be made, each with a line that names it and says why."""
    total: int = 0
    """The number of pictures to make, with those that failed before any work."""

    @contextmanager
    def attempt(self, source: Path, *, alone: bool = False) -> Iterator[None]:
        """What goes wrong in this block is the failure of `source`: it is told, the next goes on.

        Not of a picture that is asked for `alone`, nor what would go wrong with every other: a
        full disk, or nobody who reads the output.
        """
        try:
            yield
        except BrokenPipeError:
            raise
        except (InfDiTError, OSError) as error:
            ends = alone or self.single or is_disk_full(error)
            if self.debug or (ends and isinstance(error, InfDiTError)):
                raise
            if ends:
                raise CommandError(_said(error, source)) from error
            self.fail(source, reason_of(error, source))

    def fail(self, source: Path, reason: str) -> None:
        """Tell why a picture could not be made."""
        self.failed[source] = reason
        self.tell(f"error: {reason}")

    def summary(self) -> str:
        """What went wrong in a run over several pictures."""
        names = ", ".join(path.name for path in [*self.failed][:_SHOWN])
        more = f" and {len(self.failed) - _SHOWN} more" if len(self.failed) > _SHOWN else ""
        return f"{len(self.failed)} of {self.total} pictures could not be upscaled: {names}{more}"


def plan_jobs(
    inputs: list[Path],
    output: Path,
    suffix: str,
    overwrite: bool,
    *,
    recursive: bool = False,
    debug: bool = False,
    tell: Callable[[str], None],
) -> Jobs:
    """Every picture with the file of its result, none of which may be in the way of another.

    Of several pictures, those whose result exists are finished: a run that was cut off goes on.
    Results of pictures in sub-folders lie in such sub-folders of `output`.

    Raises:
        CommandError: nothing can be done: there is no picture, or `output` is one file for several
            pictures or a folder that is read, or what makes a single picture impossible.
    """
    single = len(inputs) == 1 and not os.path.isdir(inputs[0])
    one_file = bool(output.suffix) and not os.path.isdir(output)
    if one_file and not single:
        raise CommandError(f"{output} is one file; expected a folder for several pictures")
    jobs = Jobs(tell, single, debug)
    sources = _sources(inputs, output, recursive, jobs)
    belows = [below for _, below in sources]
    targets = [output] if one_file else [output / n for n in result_names(belows, suffix, tell)]
    clashes = find_clashes(targets, output)
    originals = set()
    for source, _ in sources:
        with suppress(OSError):
            originals.add(identity(source))
    for n, ((source, _), target) in enumerate(zip(sources, targets, strict=True)):
        with jobs.attempt(source):
            if identity(source) is None:
                raise CommandError(f"{source} does not exist; expected a picture or a folder")
            if not os.path.isfile(source):  # a pipe or a device would be waited for
                raise CommandError(f"{source} is no file; expected a picture or a folder")
            _check_name(target)
            if n in clashes:
                raise CommandError(
                    f"{source}: another picture's result would be {target} too; expected another"
                    " name, or another --output for each of their folders"
                )
            there = identity(target)
            if there is not None and there in originals:
                raise CommandError(f"{target} is an input; expected another --output")
            if os.path.isdir(target):
                raise CommandError(f"{target} is a folder; expected another --output")
            if overwrite or there is None:
                jobs.todo.append((source, target))
            elif single:
                raise CommandError(
                    f"{target} already exists; expected another --output or --overwrite"
                )
            else:
                jobs.finished.append(target)
    jobs.total = len(jobs.todo) + len(jobs.failed)
    return jobs


def check_jobs(
    jobs: Jobs, result_size: Callable[[Size], Size], bit_depth: int, *, scratch: bool = False
) -> None:
    """Leave in `todo` what can be made, as far as that is known before any work.

    Folders of results are made, and the heads of the pictures are read.

    Args:
        result_size: the size of the result for the size of a picture.
        scratch: whether pictures are in scratch files, where some cannot be.
    """
    planned, jobs.todo = jobs.todo, []
    folders = set()
    for source, target in planned:
        with jobs.attempt(source):
            if target.parent not in folders:
                make_folder(target.parent)
                folders.add(target.parent)
            size = picture_size(source)
            if size is None:
                read_image(source)  # it knows why
            else:
                if scratch:
                    check_scratch(has_alpha(source))
                size = result_size(size)
            check_writable(target, alpha=False, bit_depth=bit_depth, size=size)
            jobs.todo.append((source, target))


def check_result(
    target: Path, image: Tensor, size: Size, bit_depth: int, info: ImageInfo
) -> ImageInfo:
    """Refuse a result that could not be written, of a picture (1, H, W, C) that was read.

    Returns:
        what of `info` its file can hold; the log tells what it cannot.

    Raises:
        ImageError: see `check_writable`.
    """
    opaque = 1 - 0.5 / 255  # what rounds to it
    alpha = image.shape[-1] == 4 and bool((image[..., 3] < opaque).any())
    check_writable(target, alpha=alpha, bit_depth=bit_depth, size=size, info=info)
    return fitting(target, info)


def make_folder(path: Path) -> None:
    """Make a folder for results, if it is not there, and try whether it can be written to.

    Raises:
        CommandError: it cannot.
    """
    done = "made"
    try:
        path.mkdir(parents=True, exist_ok=True)
        done = "written to"
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(
            f"{path} cannot be {done} ({reason}); expected a folder to write to"
        ) from error


def reason_of(error: Exception, source: Path | str) -> str:
    """What went wrong, in words that name the picture once, as it was given."""
    reason = _said(error, source)
    for name in (str(source), PurePath(source).name):
        rest = reason.removeprefix(name)
        if rest != reason and rest[:1] in (" ", ":"):
            return f"{source}{rest}"
    return f"{source}: {reason}"


def _said(error: Exception, source: Path | str) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or source}: {error.strerror or error}"
    return str(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what it was made from, says that nothing more can be written."""
    cause = error.__cause__ or error
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _sources(
    inputs: list[Path], output: Path, recursive: bool, jobs: Jobs
) -> list[tuple[Path, Path]]:
    """Every picture once, with its path below the folder that was given."""
    sources: dict[str, tuple[Path, Path]] = {}

    def add(picture: Path, below: Path) -> None:
        place = os.path.join(os.path.realpath(picture.parent), picture.name)
        sources.setdefault(place, (picture, below))

    results = identity(output) if os.path.isdir(output) else None
    for path in inputs:
        if not os.path.isdir(path):
            add(path, Path(path.name))
            continue
        if results is not None and identity(path) == results:
            # The next run would take the results for pictures.
            raise CommandError(f"{output} is the folder that is read; expected another --output")
        found = search(path, recursive, {results} if results else ())
        if line := found.left_out(path):
            jobs.tell(line)
        for picture in found.pictures:
            add(picture, picture.relative_to(path))
        for folder, error in found.unreadable.items():
            with jobs.attempt(folder, alone=folder == path and len(inputs) == 1):
                raise error
        if not (found.pictures or found.unreadable):
            with jobs.attempt(path, alone=len(inputs) == 1):
                expected = ", ".join(sorted(READABLE))
                raise CommandError(f"{path} holds no picture; expected {expected}")
    return list(sources.values())


def result_names(belows: list[Path], suffix: str, tell: Callable[[str], None]) -> list[Path]:
    """The results' paths below the output folder: the pictures', with the suffix of the format.

    Pictures that differ in their suffixes only keep them, as in anim.gif.png and anim.webp.png.
    All of them do: if the first did not, then its result would be taken for that of the other when
    the other comes to the folder after a first run.
    """
    names = [below.with_name(f"{below.stem}.{suffix}") for below in belows]
    longer: set[int] = set()
    while True:
        times = Counter(map(_folded, names))
        new = {n for n, name in enumerate(names) if times[_folded(name)] > 1} - longer
        if not new:
            break
        for n in new:
            names[n] = belows[n].with_name(f"{belows[n].name}.{suffix}")
        longer |= new
    times = Counter(map(_folded, names))
    kept = [str(names[n]) for n in sorted(longer) if times[_folded(names[n])] == 1]
    if kept:
        tell(f"names that differ in their endings only keep these in the results: {shown(kept)}")
    return names


def find_clashes(targets: list[Path], output: Path | None) -> set[int]:
    """Numbers of the targets that would be one file; None for a store that heeds case."""
    folded, exact = Counter(map(_folded, targets)), Counter(targets)
    clashes = {n for n, target in enumerate(targets) if folded[_folded(target)] > 1}
    if any(exact[targets[n]] == 1 for n in clashes) and not (output and _ignores_case(output)):
        clashes = {n for n in clashes if exact[targets[n]] > 1}
    return clashes


def _folded(path: Path) -> str:
    return str(path).casefold()


def _ignores_case(folder: Path) -> bool:
    """Whether names that differ in case mean one file there."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".case", dir=_nearest(folder)) as file:
            path = Path(file.name)
            return path.with_name(path.name.swapcase()).exists()
    except OSError:
        return True


def _check_name(target: Path) -> None:
    """Refuse a name that the system does not take, whether or not its folder is there."""
    try:
        identity(_nearest(target.parent) / target.name)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise CommandError(
            f"the name of the result, {target.name}, is too long for {target.parent}; expected a"
            " shorter name of the picture"
        ) from error


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next((path for path in (folder, *folder.parents) if os.path.isdir(path)), folder)
