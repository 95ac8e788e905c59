"""Which files Inf-DiT Upscale Folder reads and writes, and what users are told of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import folder_paths

from ...infdit_core.cli.jobs import CommandError, Jobs, make_folder, plan_jobs
from ...infdit_core.cli.sources import identity, search
from ...infdit_core.errors import InfDiTError
from ...infdit_core.scratch import Scratch

NAME = "Inf-DiT Upscale Folder"
_SCRATCH = ".infdit-scratch"
"""Folder in that of the results; hidden, so that nothing in it is taken for a picture."""


def source_folder(folder: str) -> Path:
    """A folder below ComfyUI's input folder."""
    path = _inside(folder_paths.get_input_directory(), folder, "input")
    if not folder or not path.is_dir():
        raise InfDiTError(f"expected a folder in ComfyUI's input folder; {folder!r} is not there")
    return path


def target_folder(folder: str) -> Path:
    """A folder below ComfyUI's output folder, which need not be there."""
    return _inside(folder_paths.get_output_directory(), folder, "output")


def _inside(base: str, folder: str, name: str) -> Path:
    path = os.path.abspath(os.path.join(base, folder))
    if not folder_paths.is_within_directory(base, path):
        raise InfDiTError(f"expected a folder in ComfyUI's {name} folder; got {folder!r}")
    return Path(path)


def shown(path: Path | str) -> str:
    """A path, or paths within a text, as they are seen from ComfyUI's folder."""
    text = str(path)
    for base, name in (
        (folder_paths.get_input_directory(), "input"),
        (folder_paths.get_output_directory(), "output"),
    ):
        text = text.replace(os.path.abspath(base), name)
    return text


def plan_folder(source: Path, target: Path, format: str, overwrite: bool, recursive: bool) -> Jobs:
    """`plan_jobs` for the pictures of a folder, in the node's words."""
    try:
        make_folder(target)
        return plan_jobs([source], target, format, overwrite, recursive=recursive, tell=_warn)
    except CommandError as error:
        raise InfDiTError(in_our_words(str(error))) from error


def _warn(line: str) -> None:
    logging.warning("%s: %s", NAME, in_our_words(line))


def in_our_words(text: str) -> str:
    """What the command line says, with the node's folders and inputs."""
    text = shown(text).replace("--output or --overwrite", "output_folder or overwrite")
    text = text.replace("--scratch on a larger disk", "ComfyUI's output folder on a larger disk")
    return text.replace("--output", "output_folder").replace("--recursive", "recursive")


def file_states(
    folder: Path, recursive: bool, leave_out: Path | None = None
) -> list[tuple[str, int, int]]:
    """Path, size and time of every file of a folder; `leave_out` is a folder within."""
    if not folder.is_dir():
        return []
    ignored = identity(leave_out) if leave_out and leave_out.is_dir() else None
    found = search(folder, recursive, {ignored} if ignored else ())
    states = []
    for path in [*found.pictures, *found.others]:
        with suppress(OSError):  # it is gone again
            state = path.stat()
            name = path.relative_to(folder).as_posix()
            states.append((name, state.st_size, state.st_mtime_ns))
    return states


@contextmanager
def scratch_files(target: Path) -> Iterator[Scratch]:
    """A folder for pictures beside the results, which stays where a run left something in it."""
    scratch = Scratch(target / _SCRATCH)
    try:
        yield scratch
    finally:
        with suppress(OSError):  # it is not empty
            scratch.folder.rmdir()
