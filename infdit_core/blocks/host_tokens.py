"""Tokens that wait in the host's memory between layers, and come to the device chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class HostTokens:
    """A list of the tokens of all chunks, kept on the host.

    Getting a chunk starts the copy of the next one to the device, and setting one starts its copy
    back; both run beside the computation on a GPU, from and to pinned memory. On the device live
    two chunks that come and one that leaves. Reading in order, again and again, is what it is for;
    and inside `with`, because no memory may be freed that a copy is still at work on.

    Args:
        device: where tokens are computed.
        count: how many chunks there will be.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device, self._count = device, count
        self._host: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._coming: tuple[int, Tensor] | None = None
        self._turn = 0
        self._leaving: Tensor | None = None
        self._in, self._out = _Stream(device), _Stream(device)

    def __enter__(self) -> HostTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        self._in.join()
        self._out.join()

    def append(self, tokens: Tensor) -> None:
        """Add the tokens of the next chunk."""
        pinned = self._device.type == "cuda"
        # "cpu" by name: inside a device context the default may be another
        self._host.append(
            torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=pinned)
        )
        self[len(self._host) - 1] = tokens

    def __setitem__(self, i: int, tokens: Tensor) -> None:
        self._out.join()  # so that the last chunk may go and give its memory to what comes
        self._out.follow()
        with self._out:
            self._host[i].copy_(tokens, non_blocking=True)
        self._leaving = tokens

    def __getitem__(self, i: int) -> Tensor:
        """The tokens of a chunk on the device; valid until the next but one is asked for."""
        coming, tokens = self._coming or (None, None)
        if tokens is None or coming != i:
            tokens = self._fetch(i)
        self._in.join()
        following = (i + 1) % self._count
        self._coming = (following, self._fetch(following)) if self._count > 1 else None
        return tokens

    def _fetch(self, i: int) -> Tensor:
        waiting = self._host[i]
        if not self._slots:
            largest = max(t.numel() for t in self._host)
            self._slots = [
                torch.empty(largest, dtype=waiting.dtype, device=self._device)
                for _ in range(min(2, self._count))
            ]
        slot = self._slots[self._turn % len(self._slots)]
        self._turn += 1
        tokens = slot[: waiting.numel()].view_as(waiting)
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
