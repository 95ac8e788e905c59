"""Folders of pictures on this machine, or behind a URL that fsspec understands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..cli.jobs import CommandError
from ..cli.sources import Found, search
from ..errors import InfDiTError
from ..pictures.files import READABLE

_WHOLE_PUTS = {"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Protocols of stores in which an object appears when all of it has come."""


class Place:
    """A folder by its path, or by its URL such as s3://bucket/pictures.

    Pictures in it are named by their paths below it. It can be pickled.

    Raises:
        CommandError: no file system here takes such URLs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder: Path | None = None
        """The folder, where it is on this machine."""
        if "://" not in name:
            self.folder = Path(os.path.abspath(name))
            return
        import fsspec  # not of our requirements: of comfyui-infdit[farm]

        try:
            self._files, self._root = fsspec.core.url_to_fs(name)
        except (ImportError, ValueError) as error:
            raise CommandError(f"{name} cannot be used: {error}") from error
        self._protocols = self._files.protocol
        if isinstance(self._protocols, str):
            self._protocols = (self._protocols,)
        if "file" in self._protocols:
            self.folder = Path(self._root)

    def __str__(self) -> str:
        return self.name

    def of(self, below: Path) -> str:
        """The name of a file for people."""
        return str(self.folder / below) if self.folder else f"{self.name.rstrip('/')}/{_key(below)}"

    def search(self, recursive: bool) -> Found:
        """What the folder holds, by paths below it, but for hidden files.

        Raises:
            CommandError: there is no such folder.
        """
        if self.folder:
            return search(self.folder, recursive)
        found, folders = Found(), set()
        for key in self._keys():
            below = PurePosixPath(key)
            if any(part.startswith(".") for part in below.parts):
                continue
            if len(below.parts) > 1 and not recursive:
                folders.add(Path(below.parts[0]))
            else:
                picture = below.suffix.lower() in READABLE and _is_portable(key)
                (found.pictures if picture else found.others).append(Path(below))
        found.folders = sorted(folders)
        if not (found.pictures or found.others or folders):
            raise CommandError(f"{self.name} holds no file; expected a folder of pictures")
        return found

    def present(self, belows: list[Path]) -> set[Path]:
        """Those of some files that are there."""
        if self.folder:
            return {below for below in belows if os.path.exists(self.folder / below)}
        # one listing: a question for each of a million objects would take hours
        keys = set(self._keys())
        return {below for below in belows if _key(below) in keys}

    def exists(self, below: Path) -> bool:
        """Whether a file is there."""
        if self.folder:
            return os.path.exists(self.folder / below)
        return self._files.exists(self._path(below))

    @contextmanager
    def reading(self, below: Path, scratch: Path) -> Iterator[Path]:
        """A local file with the content of one that is here; copied to `scratch` if need be."""
        if self.folder:
            yield self.folder / below
            return
        local = scratch / below.name
        self._files.get_file(self._path(below), str(local))
        try:
            yield local
        finally:
            local.unlink(missing_ok=True)

    @contextmanager
    def writing(self, below: Path, scratch: Path, *, overwrite: bool) -> Iterator[Path]:
        """A local name to write a file to, that is here, whole, when the block ends without error.

        Raises:
            FileExistsError: it has come into being meanwhile and may not be replaced.
        """
        if self.folder:
            path = self.folder / below
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path  # whole or not at all by its writer
            return
        local = scratch / below.name
        yield local
        path = self._path(below)
        if not overwrite and self._files.exists(path):
            raise FileExistsError("it has come into being meanwhile")
        if _WHOLE_PUTS.intersection(self._protocols):
            self._files.put_file(str(local), path)
        else:
            self._put_and_move(local, path)

    def _put_and_move(self, local: Path, path: str) -> None:
        folder, _, name = path.rpartition("/")
        self._files.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{os.urandom(4).hex()}.{name}.part"
        try:
            self._files.put_file(str(local), temporary)
            self._files.mv(temporary, path)
        except BaseException:
            with suppress(Exception):  # the first failure is the reason
                self._files.rm_file(temporary)
            raise

    def _keys(self) -> list[str]:
        """All files below the folder, none where there is no folder."""
        try:
            paths: list[Any] = self._files.find(self._root)
        except FileNotFoundError:
            return []
        except InfDiTError:
            raise
        except Exception as error:  # each store has its own
            raise CommandError(f"{self.name} cannot be listed: {error}") from error
        root = self._root.rstrip("/") + "/"
        return [path.removeprefix(root) for path in paths if path.startswith(root)]

    def _path(self, below: Path) -> str:
        return f"{self._root.rstrip('/')}/{_key(below)}"


def _key(below: Path) -> str:
    return below.as_posix()


def _is_portable(key: str) -> bool:
    """Whether the path of an object is one of a local file too, the same and in its folder."""
    return "\\" not in key and "\0" not in key and (os.name != "nt" or ":" not in key)
