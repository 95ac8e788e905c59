"""Which files of the folders that were given are pictures, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..pictures.files import READABLE

_SHOWN = 3

Identity = tuple[int, int]
"""Device and number of a file: on some systems several names mean one file."""


@dataclass
class Found:
    """What a folder holds, but for hidden files."""

    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Files that are no pictures by their names."""
    folders: list[Path] = field(default_factory=list)
    """Sub-folders that were not looked into."""
    unreadable: dict[Path, OSError] = field(default_factory=dict)

    def left_out(self, folder: Path, name: str = "") -> str:
        """One line for the user, "" if nothing is left out; it calls the folder by a `name`."""
        parts = []
        if n := len(self.others):
            names = shown([str(path.relative_to(folder)) for path in self.others])
            what = "files are no pictures" if n > 1 else "file is no picture"
            parts.append(f"{n} {what} that can be read ({names})")
        if n := len(self.folders):
            what, them = ("sub-folders are", "them") if n > 1 else ("sub-folder is", "it")
            parts.append(f"{n} {what} left out; --recursive takes {them}")
        return f"{name or folder}: {', '.join(parts)}" if parts else ""


def search(folder: Path, recursive: bool, leave_out: Collection[Identity] = ()) -> Found:
    """Find the pictures of a folder, with `recursive` those of its sub-folders too.

    Every folder is read once, whatever links lead to it; `leave_out` are folders not to look at.
    """
    found, seen = Found(), set(leave_out)
    folders, links = [folder], []
    while folders or links:
        # Links last: a folder that lies here itself is found under its own name.
        here = folders.pop() if folders else links.pop()
        try:
            if (own := identity(here)) is None or own in seen:
                continue
            seen.add(own)
            if here != folder and not recursive:
                found.folders.append(here)
                continue
            entries = [path for path in here.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            found.unreadable[here] = error
            continue
        for path in entries:
            if os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            # Not what is no file, such as a pipe; a link to nothing fails when it is read.
            elif path.suffix.lower() in READABLE and (
                os.path.isfile(path) or not os.path.exists(path)
            ):
                found.pictures.append(path)
            else:
                found.others.append(path)
    for paths in (found.pictures, found.others, found.folders):
        paths.sort()
    return found


def identity(path: Path) -> Identity | None:
    """What a name means, None where there is nothing.

    Raises:
        OSError: it cannot be said, as of a name that is too long.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def shown(names: list[str], count: int = _SHOWN) -> str:
    """The first names, with ", ..." for the others."""
    return ", ".join(names[:count] + ["..."] * (len(names) > count))
