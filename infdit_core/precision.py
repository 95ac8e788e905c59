"""Convolutions in float32 that are computed in float32.

On GPUs since Ampere PyTorch lets cuDNN round what a float32 convolution multiplies to ten bits
(TF32) unless told otherwise: 6e-4 in a picture, as an H200 made it. It lets no matrix product do
so, and who allows that means it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch


def _setting() -> tuple[Any, str, Any]:
    """Where PyTorch keeps it for the whole process, under which name, and what is exact.

    The older of two names, which other programs read: it cannot be read while convolutions differ
    from what it stands for, and then the newer one has been used already.
    """
    try:
        _ = torch.backends.cudnn.allow_tf32
        return torch.backends.cudnn, "allow_tf32", False
    except RuntimeError:
        newer = torch.backends.cudnn.conv  # type: ignore[attr-defined] - absent from its stubs
        return newer, "fp32_precision", "ieee"


class _WithoutTF32(AbstractContextManager):
    """Sets it while any thread is inside, and then what it was before."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                where, name, exact = _setting()
                before = getattr(where, name)
                self._restore = partial(setattr, where, name, before) if before != exact else None
                if self._restore:
                    setattr(where, name, exact)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._restore:
                self._restore()


_without_tf32 = _WithoutTF32()


def exact_convolutions(dtype: torch.dtype) -> AbstractContextManager:
    """Around the convolutions of the network on numbers of this type."""
    if dtype != torch.float32 or torch.compiler.is_compiling():  # no graph holds a lock
        return nullcontext()
    return _without_tf32
