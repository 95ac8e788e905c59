"""Transformer layers that stay in RAM and come to the device one at a time.

Layer-major schedules use a layer for the whole picture before they turn to the next, so every
weight is copied once per evaluation, which is little beside the work of a large picture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from .layers import Layer

STREAMED = ("layers", "modulations")
"""Parts of the network that stay in RAM."""


def resident_parameters(net: nn.Module) -> Iterator[Tensor]:
    """The parameters of all other parts."""
    for name, module in net.named_children():
        if name not in STREAMED:
            yield from module.parameters()


class LayerStream:
    """Copies of transformer layers on the device, one at a time.

    Args:
        layers: in RAM; pinned here if the device is a GPU.
        device: where the network computes.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device | str) -> None:
        self._layers, self._device = layers, torch.device(device)
        if self._device.type == "cuda":
            for parameter in chain(layers.parameters(), layers.buffers()):
                parameter.data = parameter.data.pin_memory()
        self._copy = copy.deepcopy(cast("Layer", layers[0])).to("meta")
        self._index: int | None = None
        self.copied = 0
        """Layers copied so far."""

    def __getitem__(self, n: int) -> Layer:
        if n != self._index:
            self._copy.to("meta")  # lets the last layer go before the next one comes
            weights = {
                key: value.to(self._device, non_blocking=True)
                for key, value in self._layers[n].state_dict().items()
            }
            self._copy.load_state_dict(weights, assign=True)
            self._copy.requires_grad_(False)
            self._index = n
            self.copied += 1
        return self._copy
