"""Tokens that wait in the host's memory between layers, and come to the device chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import Chunk


class HostTokens:
    """The tokens of all chunks by chunk, kept on the host.

    Taking a chunk starts the copy of the next one to the device, and putting one starts its copy
    back; both run beside the computation on a GPU, from and to pinned memory. On the device live
    two chunks that come and one that leaves. Use it inside `with`, because no memory may be freed
    that a copy is still at work on.

    Args:
        device: where tokens are computed.
        cells: the (layer, chunk) cells in the order in which they are computed.
    """

    def __init__(self, device: torch.device, cells: Sequence[tuple[int, Chunk]]) -> None:
        self._device = device
        self._order = [chunk for layer, chunk in cells if layer > 0]
        self._taken = 0
        self._host: dict[Chunk, Tensor] = {}
        self._slots: list[Tensor] = []
        self._coming: Tensor | None = None
        self._leaving: Tensor | None = None
        self._in, self._out = _Stream(device), _Stream(device)

    def __enter__(self) -> HostTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        self._in.join()
        self._out.join()

    def __setitem__(self, chunk: Chunk, tokens: Tensor) -> None:
        if chunk not in self._host:
            pinned = self._device.type == "cuda"
            # "cpu" by name: inside a device context the default may be another
            self._host[chunk] = torch.empty(
                tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=pinned
            )
        self._out.join()  # so that the last chunk may go and give its memory to what comes
        self._out.follow()
        with self._out:
            self._host[chunk].copy_(tokens, non_blocking=True)
        self._leaving = tokens

    def pop(self, chunk: Chunk) -> Tensor:
        """The tokens of the next chunk in order, on the device; valid until the next but one."""
        tokens = self._fetch(chunk) if self._coming is None else self._coming
        self._in.join()
        self._taken += 1
        following = self._order[self._taken] if self._taken < len(self._order) else chunk
        # a chunk alone has not been put back when it is wanted again
        self._coming = None if following == chunk else self._fetch(following)
        return tokens

    def _fetch(self, chunk: Chunk) -> Tensor:
        waiting = self._host[chunk]
        if not self._slots:
            largest = max(t.numel() for t in self._host.values())
            self._slots = [
                torch.empty(largest, dtype=waiting.dtype, device=self._device)
                for _ in range(min(2, len(self._host)))
            ]
        self._slots.reverse()  # by turns
        tokens = self._slots[0][: waiting.numel()].view_as(waiting)
        self._in.follow(self._out)  # the chunk may still be on its way out
        self._in.follow()  # and the slot's last chunk at work
        with self._in:
            tokens.copy_(waiting, non_blocking=True)
        return tokens


class _Stream:
    """A CUDA stream beside the current one; on other devices everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._context = torch.cuda.stream(self._stream)

    def follow(self, other: _Stream | None = None) -> None:
        """Begin only after what is queued so far on another stream, or on the current one."""
        if self._stream is not None:
            stream = other._stream if other else None
            self._stream.wait_stream(stream or torch.cuda.current_stream(self._stream.device))

    def join(self) -> None:
        """Let the current stream go on only after what is queued so far here."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)
