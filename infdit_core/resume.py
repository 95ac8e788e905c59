"""What a sampling needs to go on after the process was killed, in one file.

The file is replaced after every step, whole or not at all. Its name is a digest of all that the
picture depends on: a state of another model, picture or setting is never found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .whole_files import whole_file

_FORMAT = 1
_SUFFIX = ".infdit-state"
_LENGTH = struct.Struct("<Q")
_BAND = 2**22

logger = logging.getLogger(__name__)


class State:
    """The state of one sampling.

    Args:
        folder: where its file lies.
        about: all that the picture depends on, as JSON can hold it.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._about = {"format": _FORMAT, "torch": torch.__version__, **about}
        text = json.dumps(self._about, sort_keys=True)
        self.path = folder / (hashlib.sha256(text.encode()).hexdigest()[:24] + _SUFFIX)

    def save(self, done: int, x: Tensor, history: Sequence[Tensor]) -> None:
        """Keep what follows from the first `done` steps.

        Args:
            x: on the CPU, float32 and contiguous.
            history: derivatives, like x.
        """
        head = {"done": done, "history": len(history), "shape": list(x.shape)}
        text = json.dumps(head | {"about": self._about}).encode()
        with whole_file(self.path) as file:
            file.write(_LENGTH.pack(len(text)) + text)
            for picture in (x, *history):
                for band in _bytes(picture):
                    file.write(band)

    def load(self, x: Tensor, like: Callable[[Tensor], Tensor]) -> tuple[int, list[Tensor]]:
        """Steps done and the derivatives; x is filled. (0, []) and x as it was if there is none.

        Args:
            x: like that of `save`.
            like: makes room for a derivative.
        """
        try:
            with self.path.open("rb") as file:
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                size = self.path.stat().st_size - _LENGTH.size - length
                head = json.loads(file.read(length)) if size >= 0 else {}
                pictures = 1 + head.get("history", 0)
                if head.get("shape") != list(x.shape) or size != pictures * x.nbytes:
                    logger.warning("Inf-DiT: %s is damaged; the run begins anew", self.path)
                    return 0, []
                history = [like(x) for _ in range(pictures - 1)]
                for picture in (x, *history):
                    for band in _bytes(picture):
                        file.readinto(band)
        except FileNotFoundError:
            return 0, []
        except (OSError, ValueError, struct.error) as error:
            logger.warning("Inf-DiT: %s: %s; the run begins anew", self.path, error)
            return 0, []
        return head["done"], history

    def others(self) -> list[Path]:
        """States of other samplings in the folder."""
        return sorted(p for p in self.path.parent.glob("*" + _SUFFIX) if p != self.path)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the names, shapes and bits of tensors on any device."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _bytes(picture: Tensor) -> Iterator[memoryview]:
    flat = picture.view(-1)
    for start in range(0, flat.numel(), _BAND):
        yield flat[start : start + _BAND].numpy().data.cast("B")
