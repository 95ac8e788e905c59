"""What goes from a strip of a picture to the next: in every layer a line of keys and values.

Layer n of a strip's first line reads the last line of the strip before in the same layer, and
nothing reads back. So strips run as a pipeline: each is a layer behind the one before, and waits
for nobody once it has begun.
"""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import torch
from torch import Tensor

_WAITING_LINES = 2
"""That a strip may be ahead of the next: each is memory of its device."""
_LOOK_S = 0.05
"""Seconds between two looks at whether another strip has failed."""


class Link(Protocol):
    """A strip's way to the strips before and after it."""

    @property
    def has_before(self) -> bool:
        """Whether there is a strip before."""
        ...

    @property
    def has_after(self) -> bool:
        """Whether there is a strip after."""
        ...

    def receive(self, layer: int, out: Tensor) -> None:
        """Fill `out` (2, B, blocks, T, heads, d) with the line of the strip before."""
        ...

    def send(self, layer: int, line: Tensor) -> None:
        """Give the strip after its line (2, B, blocks, T, heads, d), which may change then."""
        ...


class StripsStopped(RuntimeError):
    """Another strip has failed, whose error says why."""


class LocalLinks:
    """Links of strips in one process, a thread each: `links`, from the first strip to the last.

    Args:
        count: of the strips. Between GPUs lines are copied on a stream of their own.
    """

    def __init__(self, count: int) -> None:
        self._stop = threading.Event()
        queues = [queue.Queue(_WAITING_LINES) for _ in range(count - 1)]
        befores, afters = [None, *queues], [*queues, None]
        self.links = [
            _LocalLink(before, after, self._stop)
            for before, after in zip(befores, afters, strict=True)
        ]

    def stop(self) -> None:
        """Have all strips that wait for another raise `StripsStopped`."""
        self._stop.set()


class _LocalLink:
    def __init__(
        self, before: queue.Queue | None, after: queue.Queue | None, stop: threading.Event
    ) -> None:
        self._before, self._after, self._stop = before, after, stop
        self.has_before, self.has_after = before is not None, after is not None
        self._stream: torch.cuda.Stream | None = None
        self.sent_bytes = 0

    def receive(self, layer: int, out: Tensor) -> None:
        if self._before is None:
            raise RuntimeError("the first strip has none before it")
        sent, line, event = self._waiting(self._before.get)
        if sent != layer:
            raise RuntimeError(f"expected the line of layer {layer}, got that of {sent}")
        if event is None:
            out.copy_(line)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(line.device)
        self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):  # not behind what the other device computes by now
            out.copy_(line, non_blocking=True)
        line.record_stream(self._stream)

    def send(self, layer: int, line: Tensor) -> None:
        if self._after is None:
            raise RuntimeError("the last strip has none after it")
        line = line.clone(memory_format=torch.contiguous_format)
        event = None
        if line.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(line.device))
        self.sent_bytes += line.nbytes
        self._waiting(self._after.put, (layer, line, event))

    def _waiting(self, call, *args):
        while not self._stop.is_set():
            try:
                return call(*args, timeout=_LOOK_S)
            except (queue.Empty, queue.Full):
                pass
        raise StripsStopped("another strip of the picture has failed")
