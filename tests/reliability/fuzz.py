"""Reads broken and hostile files under watch.

An input must be read or refused with the reader's own error in one line or a few, within a second
(a picture, which may be whole and large, within three) and a bounded amount of memory, while
nothing is imported, run, started or written.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import tifffile

from infdit_core.checkpoints.checkpoint import CheckpointError, open_checkpoint
from infdit_core.checkpoints.load import check, load_model, read_config
from infdit_core.checkpoints.names import network_state_dict
from infdit_core.pictures import tiff
from infdit_core.pictures.files import ImageError, read_image
from tests.reliability import hostile, hostile_pictures

SECONDS, PICTURE_SECONDS = 1.0, 3.0
EXTRA_BYTES = 256 * 2**20
"""Memory that reading one small file may take beside what the process has."""
LONGEST_MESSAGE = 4000
FIRST_SEED = int(os.environ.get("INFDIT_SEED", "0"))
"""Of inputs by chance."""

_FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
    "os.putenv",
    "shutil.",
    "socket.",
    "ctypes.",
    "urllib.",
    "builtins.input",
)
_events: list[str] | None = None
"""What happened that should not have, while `watched`."""
_hooked = False


class Finding(AssertionError):
    """A reader did what it must not."""


def _audit(event: str, args: tuple) -> None:
    if _events is None:
        return
    # The mode is None where a descriptor's flags say it instead.
    writes = event == "open" and (set(str(args[1] or "r")) & set("wax+") or int(args[2]) & 3)
    cython = event == "compile" and args[0] == b"_getframe()"  # for its tracebacks
    if writes or (event.startswith(_FORBIDDEN) and not cython):
        _events.append(f"{event} {args!r:.200}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Record what Python runs, imports, starts and writes (PEP 578) while the block runs."""
    global _events, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # for good: there is no removing it
        _hooked = True
    _events = events = []
    try:
        yield events
    finally:
        _events = None


def load(path: Path) -> None:
    """All that a loader does with a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        config = read_config(checkpoint)
        check(checkpoint, config)
        for tensor in network_state_dict(checkpoint, config).values():
            tensor.sum()
    load_model(path)


def attempt(
    read: Callable[[Path], object], path: Path, error: type[Exception], limit: float = SECONDS
) -> str | None:
    """Read a file under all that must hold, in at most `limit` seconds of CPU time.

    Returns:
        the message it was refused with, None if it was read.

    Raises:
        Finding: another exception, a long message, too much time, or a forbidden act.
    """
    refused = None
    start = time.thread_time()
    with watched() as events:
        try:
            read(path)
        except error as caught:
            refused = str(caught)
        except BaseException as caught:
            if isinstance(caught, KeyboardInterrupt):
                raise
            raise Finding(f"{type(caught).__name__}: {caught}") from caught
    seconds = time.thread_time() - start
    if events:
        raise Finding(f"forbidden: {events}")
    if seconds > limit:
        raise Finding(f"took {seconds:.1f} s")
    if refused is not None and not 10 < len(refused) <= LONGEST_MESSAGE:
        raise Finding(f"a message of {len(refused)} characters: {refused[:200]}")
    return refused


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Make larger allocations fail with MemoryError, which no reader may let out."""
    import resource  # Unix only

    status = Path("/proc/self/status").read_text()
    own = int(next(x for x in status.splitlines() if "VmData" in x).split()[1]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (own + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


TARGETS = {
    "checkpoint": (hostile.checkpoint, load, CheckpointError, SECONDS),
    "picture": (hostile_pictures.picture, read_image, ImageError, PICTURE_SECONDS),
}


def warm_up(folder: Path) -> None:
    """Whole files first: what they import and allocate once is no finding."""
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "latin-1", "ascii", "utf-8"):
        codecs.lookup(codec)
    for number in tiff.COMPRESSIONS:
        tifffile.TIFF.DECOMPRESSORS[number]
    for number in (2, 3, 34892, 34893, 34894, 34895):
        tifffile.TIFF.UNPREDICTORS[number]
    for name, whole in (
        ("a.pt", hostile.whole_pt()),
        ("a.safetensors", hostile.whole_safetensors()),
    ):
        (folder / name).write_bytes(whole)
        load(folder / name)
    damaged = (hostile_pictures.picture(Random(-1 - i))[1] for i in range(100))
    for data in (*hostile_pictures.pictures().values(), *damaged):
        (folder / "a.png").write_bytes(data)
        with suppress(ImageError):
            read_image(folder / "a.png")
