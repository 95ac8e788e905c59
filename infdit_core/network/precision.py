"""Convolutions in float32 that are computed in float32.

On GPUs since Ampere PyTorch lets cuDNN round what a float32 convolution multiplies to ten bits
(TF32) unless told otherwise: 6e-4 in a picture, as an H200 made it. It lets no matrix product do
so, and who allows that means it.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NEWER = getattr(torch.backends.cudnn, "conv", None)
_API = (  # from PyTorch 2.9 on the older one refuses to be read where the newer one was used
    (_NEWER, "fp32_precision", "ieee")
    if _NEWER is not None
    else (torch.backends.cudnn, "allow_tf32", False)
)
"""Where PyTorch keeps it for the whole process, under which name, and what is exact."""


class _WithoutTF32(AbstractContextManager):
    """Sets it while any thread is inside, and then what it was before."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: Any = None

    def __enter__(self) -> None:
        where, name, exact = _API
        with self._lock:
            if not self._inside:
                self._before = getattr(where, name)
                setattr(where, name, exact)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        where, name, _exact = _API
        with self._lock:
            self._inside -= 1
            if not self._inside:
                setattr(where, name, self._before)


_without_tf32 = _WithoutTF32()


def exact_convolutions(dtype: torch.dtype) -> AbstractContextManager:
    """Around the convolutions of the network on numbers of this type."""
    if dtype != torch.float32 or torch.compiler.is_compiling():  # no graph holds a lock
        return nullcontext()
    return _without_tf32
