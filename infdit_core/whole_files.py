"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write and read; it is named `path` when the block ends without an error.

    Until then it lies beside `path` under another name. What killed processes left of earlier
    writes to `path` is removed.

    Args:
        overwrite: whether a file that exists is replaced.

    Raises:
        FileExistsError: the file exists when the block ends and may not be replaced.
    """
    path = Path(path)
    # A checksum of the name: the name itself may be as long as the file system allows.
    prefix = f".{zlib.crc32(os.fsencode(path.name)):08x}."
    for leftover in path.parent.glob(f"{prefix}*.part"):
        with suppress(OSError):  # no reason to lose what is written now
            leftover.unlink()
    temporary = path.with_name(f"{prefix}{os.urandom(4).hex()}.part")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must not be on the disk before the content
        if path.exists() and not overwrite:
            raise FileExistsError("it has come into being meanwhile")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
