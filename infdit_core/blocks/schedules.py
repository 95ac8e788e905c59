"""Orders of computation: which (layer, chunk) cell comes when, and what waits where meanwhile.

Layer n of a block reads only layer-n keys and values of its left-top, left and top neighbours, so
every order that takes chunks from the top left gives the same result. What differs is memory:

- `Full` keeps the tokens and one layer's activations of the whole picture.
- `BlockMajor` takes a square of blocks through all layers, keeping every layer's frontier.
- `LayerMajor` takes one layer over all chunks, keeping the tokens and one layer's frontier.

A schedule computes nothing and moves nothing: `network.model` walks its cells, and the planner asks
for its residency.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InfDiTError
from .grid import Chunk, Grid
from .host_tokens import HostTokens


class Cell(NamedTuple):
    """One layer of one chunk."""

    layer: int
    chunk: Chunk


class Residency(NamedTuple):
    """What lies where while a chunk is at work."""

    chunk: Chunk
    """The largest chunk."""
    frontiers: int
    """Layers whose frontier is kept at a time."""
    tokens: int
    """Blocks whose tokens wait on the device."""
    host_tokens: int = 0
    """Blocks whose tokens wait in the host's memory."""


class Schedule(ABC):
    """An order of computation. The attributes say what is kept, and where."""

    keep_lr: bool = True
    """Keys and values of the LR picture are made once and kept for all evaluations. Without, they
    are made anew for every chunk, 0.1 % of the work."""
    tokens_on_host: bool = False
    """Tokens wait in the host's memory between layers, instead of that of the model's device."""
    pictures_device: str | torch.device | None = None
    """Where the solver's pictures live; None for the device of the model."""
    stream_weights: bool = False
    """The layers' weights stay on the host and come to the device one layer at a time."""

    @abstractmethod
    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        """The chunks of a picture in scanning order; the first is the largest."""

    @abstractmethod
    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        """The whole computation in order."""

    @abstractmethod
    def residency(self, grid: Grid, num_layers: int) -> Residency:
        """What is kept beside the chunk at work."""

    def tokens(
        self, device: torch.device, cells: Sequence[Cell]
    ) -> AbstractContextManager[dict[Chunk, Tensor] | HostTokens]:
        """Where the tokens (B, r, c, T, hidden) of chunks wait between two of their layers."""
        return HostTokens(device, cells) if self.tokens_on_host else nullcontext({})


@dataclass(frozen=True)
class BlockMajor(Schedule):
    """`blocks`×`blocks` blocks at a time through all layers (figure 3 of the paper).

    Keeps one line of blocks of keys and values per layer, along the shorter side of the picture.
    """

    blocks: int = 1

    def __post_init__(self) -> None:
        _require_positive("blocks", self.blocks)

    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        return grid.chunks(self.blocks, self.blocks)

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        return [Cell(n, chunk) for chunk in self.chunks(grid) for n in range(num_layers)]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        return Residency(next(self.chunks(grid)), frontiers=num_layers, tokens=0)

    def __str__(self) -> str:
        return f"block by block, {self.blocks}×{self.blocks} at a time"


@dataclass(frozen=True)
class Full(Schedule):
    """The whole picture at once: the most memory."""

    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        yield grid.whole

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        return [Cell(n, grid.whole) for n in range(num_layers)]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        return Residency(grid.whole, frontiers=0, tokens=0)

    def __str__(self) -> str:
        return "the whole picture at once"


@dataclass(frozen=True)
class LayerMajor(Schedule):
    """One layer at a time over the picture, `blocks_per_chunk` blocks at a time.

    Keeps the tokens of the picture and one line of blocks of keys and values of one layer.
    """

    blocks_per_chunk: int = 1
    tokens_on_host: bool = False
    keep_lr: bool = True
    pictures_device: str | torch.device | None = None
    stream_weights: bool = False

    def __post_init__(self) -> None:
        _require_positive("blocks_per_chunk", self.blocks_per_chunk)

    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        """Parts of a line of blocks, or as many whole lines as a chunk holds."""
        lines, length = divmod(self.blocks_per_chunk, grid.shorter)
        return grid.chunks(lines, grid.shorter) if lines else grid.chunks(1, length)

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        chunks = list(self.chunks(grid))
        return [Cell(n, chunk) for n in range(num_layers) for chunk in chunks]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        chunk = next(self.chunks(grid))
        waiting = grid.blocks - chunk.blocks
        if not self.tokens_on_host:
            return Residency(chunk, frontiers=1, tokens=waiting)
        # two slots for what comes, one of them counted with the chunk; and what leaves
        return Residency(chunk, 1, min(2 * chunk.blocks, waiting), host_tokens=grid.blocks)

    def __str__(self) -> str:
        m = self.blocks_per_chunk
        parts = [f"layer by layer, {m} block{'s' * (m > 1)} at a time"]
        parts += ["tokens in RAM"] * self.tokens_on_host
        parts += ["LR keys not kept"] * (not self.keep_lr)
        parts += ["pictures in RAM"] * (self.pictures_device is not None)
        parts += ["weights in RAM"] * self.stream_weights
        return ", ".join(parts)


def candidates(grid: Grid, *, host: bool, weights: bool) -> Iterator[Schedule]:
    """The schedules worth considering for a picture.

    Args:
        host: whether the host's memory is another than the device's, so that things can wait there.
        weights: whether the network's weights may wait there too.
    """
    longer, shorter = max(grid), grid.shorter
    yield Full()
    sizes = [lines * shorter for lines in _halvings(longer)]
    sizes += [blocks for blocks in _halvings(shorter) if blocks < shorter]
    for size in sizes:
        yield LayerMajor(size)
        yield LayerMajor(size, keep_lr=False)
        if host:
            yield LayerMajor(size, tokens_on_host=True)
            lean = LayerMajor(size, tokens_on_host=True, keep_lr=False)
            yield lean
            lean = replace(lean, pictures_device="cpu")
            yield lean
            if weights:
                yield replace(lean, stream_weights=True)
    for blocks in _halvings(shorter):
        yield BlockMajor(blocks)


def _halvings(n: int) -> Iterator[int]:
    while n >= 1:
        yield n
        n //= 2


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InfDiTError(f"{name}: expected at least 1, got {value}")
