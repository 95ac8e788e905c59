"""One piece of the host's memory for a sampling run, pinned where that is possible.

torch's own pinned memory is rounded up to a power of two and kept when it is not used any more:
43 GB of tokens would take 69 GB.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

Unpin = Callable[[], object]
Pin = Callable[[Tensor, torch.device], Unpin | None]
"""Pins a tensor of the host for copies from and to a GPU; what undoes it, None if it failed."""

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all GPUs."""

logger = logging.getLogger(__name__)


def pin(memory: Tensor, device: torch.device) -> Unpin | None:
    """Pin memory where it lies."""
    cudart: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    if int(cudart.cudaHostRegister(address, memory.nbytes, _PORTABLE)) == 0:
        return partial(cudart.cudaHostUnregister, address)
    with suppress(RuntimeError):  # CUDA would report the failure at the next launch
        torch.zeros(1, device=device).add_(1)
    return None


class HostBuffer:
    """Memory of the host, as much as was asked for at once so far.

    It is given back by `release`, or when this object goes.

    Args:
        pin: how to pin it.
    """

    def __init__(self, pin: Pin | None = None) -> None:
        self._pin = pin
        self._memory: Tensor | None = None
        self._unpin: weakref.finalize | None = None

    @property
    def pinned(self) -> bool:
        """Whether copies between this memory and the device go on beside the computation."""
        return self._unpin is not None

    def take(self, size: int, device: torch.device) -> Tensor:
        """`size` bytes (uint8), the same memory in every call.

        Args:
            device: what they are copied from and to.
        """
        if self._memory is None or self._memory.nbytes < size:
            self.release()
            # "cpu" by name: inside a device context the default may be another
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            if device.type == "cuda":
                self._pin_for(self._memory, device)
        return self._memory[:size]

    def _pin_for(self, memory: Tensor, device: torch.device) -> None:
        unpin = None
        with suppress(RuntimeError):  # torch.AcceleratorError too
            unpin = (self._pin or pin)(memory, device)
        if unpin is None:
            logger.info("Inf-DiT: RAM is not pinned; copies from and to it are slower")
            return
        self._unpin = weakref.finalize(self, _unpin_when_idle, unpin, memory, device)
        self._unpin.atexit = False  # the process gives it back

    def release(self) -> None:
        """Give the memory back; nothing that `take` returned may be used any more."""
        if self._unpin is not None:
            self._unpin()
        self._unpin = self._memory = None


def _unpin_when_idle(unpin: Unpin, memory: Tensor, device: torch.device) -> None:
    """Unpin `memory`, which lives till then, after the copies that are still at work."""
    with suppress(RuntimeError):  # after an error of the device there is nothing to wait for
        torch.cuda.synchronize(device)
    unpin()
