"""Where pictures live: in memory, or in files of a folder that the system keeps in its page cache.

A file is made, unlinked, reserved on the disk and mapped, so that nothing is left of it however a
run ends. Its pages are the system's to write out and to read again: they are no memory of the
process, which a picture of any size leaves free for the network.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InfDiTError
from .resume import State

Empty = Callable[..., Tensor]
"""Makes room for a float32 picture: `empty(shape, device)`, uninitialised. Where it lies is its own
choice, the device what it should be if it lies in memory."""

logger = logging.getLogger(__name__)


class ScratchError(InfDiTError):
    """The folder cannot hold what is to be kept there."""


def in_memory(shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Room for a float32 picture in the memory of a device."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=device)


class Scratch:
    """Pictures in files of a folder, which is made if it is not there.

    Use it inside `with` for one run after another: what the run left for another to go on is
    removed at its end, and stays where an error or a signal ends it.

    Raises:
        ScratchError: nothing can be written there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._states: list[State] = []
        self._foreign: set[Path] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ScratchError(
                f"{folder} cannot be used for scratch files ({error.strerror or error}); expected a"
                " folder to write to"
            ) from error

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # the result is in safety
            for state in self._states:
                state.remove()
        self._states.clear()

    def state(self, about: Mapping[str, Any]) -> State:
        """What a sampling leaves, by all that its picture depends on."""
        state = State(self.folder, about)
        ours = {other.path for other in self._states}
        for other in set(state.others()) - ours - self._foreign:
            self._foreign.add(other)
            logger.warning(
                "Inf-DiT: %s is of a run with another picture, model or setting that did not end:"
                " it is left alone, and takes %s",
                other,
                _amount(other.stat().st_size),
            )
        self._states.append(state)
        return state

    def empty(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Room for a float32 picture (zeros) in a file; always on the CPU.

        The file goes with the last tensor that sees it.

        Raises:
            ScratchError: the disk is full.
        """
        count = math.prod(shape)
        number, name = tempfile.mkstemp(".scratch", dir=self.folder)
        path = Path(name)
        try:
            self._reserve(number, max(1, count) * 4)
            os.close(number)
            mapped = torch.from_file(name, shared=True, size=count, dtype=torch.float32)
        except BaseException:
            with suppress(OSError):
                os.close(number)
            path.unlink(missing_ok=True)
            raise
        if sys.platform == "win32":  # where a file that is mapped cannot be unlinked
            weakref.finalize(mapped.untyped_storage(), _unlink_later, path)
        else:
            path.unlink()
        return mapped.view(tuple(shape))

    def require(self, needed: float, what: str) -> None:
        """Refuse `what` where it needs more bytes than the disk has free.

        Raises:
            ScratchError: names the folder, and says how much there is.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ScratchError(
                f"{what}: {_amount(needed)} of scratch files are needed in {self.folder}, where"
                f" {_amount(free)} are free. Expected --scratch on a larger disk, or a smaller"
                " result"
            )

    def _reserve(self, number: int, size: int) -> None:
        """Take a file's bytes now: a disk that fills later would end the process by a signal."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(number, 0, size)
            else:
                self.require(size, "a picture")
                os.truncate(number, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.require(size, "a picture")
            raise ScratchError(
                f"{self.folder}: {_amount(size)} cannot be taken for a picture"
                f" ({error.strerror or error}). Expected --scratch on a larger disk"
            ) from error


def _unlink_later(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _amount(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
