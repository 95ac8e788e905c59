"""Transformer layers that stay in RAM and come to the device in turn.

Layer-major schedules use a layer for the whole picture before they turn to the next, so every
weight is copied once per evaluation, which is little beside the work of a large picture; with
block-major ones it is once per chunk. Either way the next layer comes while one computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..blocks.host_buffer import HostBuffer
from ..blocks.host_store import SideStream
from .layers import Layer

STREAMED = ("layers", "modulations")
"""Parts of the network that stay in RAM."""
SLOTS = 2
"""Layers on the device: the one at work and the next."""
_ALIGNMENT = 256
"""Bytes that every tensor of a layer begins at a multiple of, as torch's own do on a GPU."""


def resident_parameters(net: nn.Module) -> Iterator[Tensor]:
    """The parameters of all other parts."""
    for name, module in net.named_children():
        if name not in STREAMED:
            yield from module.parameters()


class LayerStream:
    """Copies of transformer layers on the device, in turn.

    Args:
        layers: in RAM; moved there into one piece of memory, pinned if the device is a GPU.
        device: where the network computes.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device | str) -> None:
        self._device, self._count = torch.device(device), len(layers)
        places = _places(layers[0].state_dict())
        size = max(place.end for place in places.values())
        self._buffer = HostBuffer()  # goes first, after the copies that are on their way
        memory = self._buffer.take(len(layers) * size, self._device)
        self._host = memory.view(len(layers), size)
        for layer, room in zip(layers, self._host, strict=True):
            views = _views(room, places)
            for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                views[key].copy_(tensor.detach())
                tensor.data = views[key]
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._copies = [_on(slot, cast("Layer", layers[0]), places) for slot in self._slots]
        self._held: list[int | None] = [None] * SLOTS
        """Layers in the slots."""
        self._in = SideStream(self._device)
        self.copied = 0
        """Layers copied so far."""

    def __getitem__(self, n: int) -> Layer:
        if self._held[0] != n:  # by turns: the first slot is the one at work
            for items in (self._slots, self._copies, self._held):
                items.reverse()
            if self._held[0] != n:
                self._fetch(n, 0)
            self._in.join()
            self._fetch((n + 1) % self._count, 1)
        return self._copies[0]

    def _fetch(self, n: int, slot: int) -> None:
        self._in.follow()  # what was in the slot before may still be at work
        with self._in:
            self._slots[slot].copy_(self._host[n], non_blocking=self._buffer.pinned)
        self._held[slot] = n
        self.copied += 1


class _Place(NamedTuple):
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _places(state: Mapping[str, Tensor]) -> dict[str, _Place]:
    """Where each tensor of a layer lies among its bytes."""
    places, start = {}, 0
    for key, tensor in state.items():
        end = start + tensor.nbytes
        places[key] = _Place(start, end, tensor.dtype, tuple(tensor.shape))
        start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
    return places


def _views(memory: Tensor, places: Mapping[str, _Place]) -> dict[str, Tensor]:
    """The tensors of a layer that lies in `memory`."""
    return {
        key: memory[place.start : place.end].view(place.dtype).view(place.shape)
        for key, place in places.items()
    }


def _on(memory: Tensor, layer: Layer, places: Mapping[str, _Place]) -> Layer:
    """A layer like another whose tensors lie in `memory`."""
    views = _views(memory, places)
    tensors = {id(t): nn.Parameter(views[k], False) for k, t in layer.named_parameters()}
    return copy.deepcopy(layer, tensors | {id(t): views[k] for k, t in layer.named_buffers()})
