"""Tensors that wait in the host's memory between their uses, and come to the device ahead of them.

Both ways are used at once: what comes waits for its own way out and not for what left after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .host_buffer import HostBuffer

Key = TypeVar("Key", bound=Hashable)


class HostStore(Generic[Key]):
    """Tensors by key, kept on the host.

    Taking one starts the copy of the next to the device, and putting one starts its copy to the
    host; on a GPU both run beside the computation. On the device live two that come and one that
    leaves. Use it inside `with`, because no memory may be freed that a copy is still at work on.

    Args:
        device: where the tensors are used.
        sizes: how large the tensors are in relation to each other, by key.
        order: the keys in the order in which they are taken.
        buffer: the host's memory.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Mapping[Key, int],
        order: Sequence[Key],
        buffer: HostBuffer,
    ) -> None:
        self._device, self._sizes, self._order, self._buffer = device, sizes, order, buffer
        ends = list(accumulate(sizes.values()))
        self._places = {key: (end - sizes[key], end) for key, end in zip(sizes, ends, strict=True)}
        self._taken = 0
        self._memory: Tensor | None = None
        self._host: dict[Key, Tensor] = {}
        """What is there now."""
        self._left: dict[Key, torch.cuda.Event | None] = {}
        """When it was."""
        self._slots: list[Tensor] = []
        self._coming: Tensor | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._in, self._out = SideStream(device), SideStream(device)

    def __enter__(self) -> HostStore[Key]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._in.join()
        self._out.join()

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        room = self._room(key, tensor)
        if self._leaving is not None:  # which may go now, and give its memory to what comes
            self._out.join(self._leaving[1])
        self._out.follow()
        with self._out:
            room.copy_(tensor, non_blocking=self._buffer.pinned)
        self._host[key], self._left[key] = room, self._out.event()
        self._leaving = tensor, self._left[key]

    def pop(self, key: Key) -> Tensor:
        """The tensor of the next key in order, on the device; valid until the next but one."""
        tensor = self._fetch(key) if self._coming is None else self._coming
        self._in.join()
        self._taken += 1
        self._coming = None
        for following in self._order[self._taken : self._taken + 1]:
            if following in self._host:  # where there are few it may not be there yet
                self._coming = self._fetch(following)
        return tensor

    def _room(self, key: Key, tensor: Tensor) -> Tensor:
        start, end = self._places[key]
        unit = tensor.numel() // (end - start)
        if self._memory is None:
            numel = unit * sum(self._sizes.values())
            memory = self._buffer.take(numel * tensor.itemsize, self._device)
            self._memory = memory.view(tensor.dtype)
            self._slots = [
                torch.empty(
                    unit * max(self._sizes.values()), dtype=tensor.dtype, device=self._device
                )
                for _ in range(min(2, len(self._sizes)))
            ]
        return self._memory[unit * start : unit * end].view(tensor.shape)

    def _fetch(self, key: Key) -> Tensor:
        waiting = self._host.pop(key)
        self._slots.reverse()  # by turns
        tensor = self._slots[0][: waiting.numel()].view(waiting.shape)
        self._in.follow(self._left[key])  # it may still be on its way out
        self._in.follow()  # and what was in the slot before at work
        with self._in:
            tensor.copy_(waiting, non_blocking=self._buffer.pinned)
        return tensor


class SideStream:
    """A CUDA stream beside the current one; on other devices everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._context = torch.cuda.stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """When all that is queued here so far is done."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def follow(self, event: torch.cuda.Event | None = None) -> None:
        """Begin only after an event, or after what is queued so far on the current stream."""
        if self._stream is None:
            return
        if event is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        else:
            self._stream.wait_event(event)

    def join(self, event: torch.cuda.Event | None = None) -> None:
        """Let the current stream go on only after an event, or after what is queued here so far."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        if event is None:
            current.wait_stream(self._stream)
        else:
            current.wait_event(event)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)
