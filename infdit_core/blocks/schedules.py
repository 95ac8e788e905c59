"""Orders of computation: which (layer, chunk) cell comes when, and what waits where meanwhile.

Layer n of a block reads only layer-n keys and values of its left-top, left and top neighbours, so
every order that takes chunks from the top left gives the same result. What differs is memory:

- `Full` keeps the tokens and one layer's activations of the whole picture.
- `BlockMajor` takes a square of blocks through all layers, keeping every layer's frontier, whose
  line of blocks may wait in the host's memory.
- `LayerMajor` takes one layer over all chunks, keeping the tokens and one layer's frontier.

A schedule computes nothing and moves nothing: `network.model` walks its cells, and the planner asks
for its residency.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InfDiTError
from .grid import Chunk, Grid, Line
from .host_buffer import HostBuffer
from .host_store import HostStore


class Cell(NamedTuple):
    """One layer of one chunk."""

    layer: int
    chunk: Chunk


class Residency(NamedTuple):
    """What lies where while a chunk is at work, in tokens of a block; keys and values are two."""

    chunk: Chunk
    """The largest chunk."""
    device: int = 0
    """Waiting on the device."""
    host: int = 0
    """Waiting in the host's memory."""
    moved: float = 0.0
    """Going to the host and coming back for every block and layer."""
    turn: int = 0
    """Blocks that a layer computes before the next layer's turn; 0 for all."""


class Schedule(ABC):
    """An order of computation. The attributes say what is kept, and where."""

    keep_lr: bool = True
    """Keys and values of the LR picture are made once and kept for all evaluations. Without, they
    are made anew for every chunk, 0.1 % of the work."""
    tokens_on_host: bool = False
    """Tokens wait in the host's memory between layers, instead of that of the model's device."""
    frontier_on_host: bool = False
    """So do the lines of keys and values of all layers."""
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

    @property
    def on_host(self) -> bool:
        """Whether what waits between two uses waits in the host's memory."""
        return self.tokens_on_host or self.frontier_on_host

    def tokens(
        self, device: torch.device, cells: Sequence[Cell], buffer: HostBuffer
    ) -> AbstractContextManager[dict[Chunk, Tensor] | HostStore[Chunk]]:
        """Where the tokens (B, r, c, T, hidden) of chunks wait between two of their layers."""
        if not self.tokens_on_host:
            return nullcontext({})
        sizes = {chunk: chunk.blocks for _, chunk in cells}
        order = [chunk for layer, chunk in cells if layer > 0]
        return HostStore(device, sizes, order, buffer)

    def lines(
        self, device: torch.device, grid: Grid, cells: Sequence[Cell], buffer: HostBuffer
    ) -> AbstractContextManager[Line | None]:
        """Where the keys and values wait that `Frontier` keeps by (layer, first block); or None."""
        if not self.frontier_on_host:
            return nullcontext(None)
        scanned = [Cell(n, grid.scanned(chunk)) for n, chunk in cells]
        sizes = {(n, chunk.left): chunk.columns for n, chunk in scanned}
        order = [(n, chunk.left) for n, chunk in scanned if chunk.top > 0]
        return HostStore(device, sizes, order, buffer)


@dataclass(frozen=True)
class BlockMajor(Schedule):
    """`blocks`×`blocks` blocks at a time through all layers (figure 3 of the paper).

    Keeps one line of blocks of keys and values per layer, along the shorter side of the picture.
    """

    blocks: int = 1
    frontier_on_host: bool = False
    keep_lr: bool = True
    pictures_device: str | torch.device | None = None
    stream_weights: bool = False

    def __post_init__(self) -> None:
        _require_positive("blocks", self.blocks)

    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        return grid.chunks(self.blocks, self.blocks)

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        return [Cell(n, chunk) for chunk in self.chunks(grid) for n in range(num_layers)]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        chunk = next(self.chunks(grid))
        line, ends = frontier_blocks(grid, chunk)
        if not self.frontier_on_host:
            waiting = 2 * num_layers * (line + ends)
            return Residency(chunk, waiting, turn=chunk.blocks)
        # beside ends and corners two slots for what comes, what leaves, and the line above whole
        length = grid.scanned(chunk).columns
        slots = 4 * length + 1 if line else 0
        moved = 2 * length / chunk.blocks
        waiting = 2 * (num_layers * (ends + bool(line)) + slots)
        host = 2 * num_layers * grid.line_blocks if line else 0
        return Residency(chunk, waiting, host, moved, chunk.blocks)

    def __str__(self) -> str:
        parts = [f"block by block, {self.blocks}×{self.blocks} at a time"]
        parts += ["keys and values in RAM"] * self.frontier_on_host
        return ", ".join([*parts, *_places(self)])


@dataclass(frozen=True)
class Full(Schedule):
    """The whole picture at once: the most memory."""

    def chunks(self, grid: Grid) -> Iterator[Chunk]:
        yield grid.whole

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        return [Cell(n, grid.whole) for n in range(num_layers)]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        return Residency(grid.whole)

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
        lines, length = divmod(self.blocks_per_chunk, grid.line_blocks)
        return grid.chunks(lines, grid.line_blocks) if lines else grid.chunks(1, length)

    def cells(self, grid: Grid, num_layers: int) -> list[Cell]:
        chunks = list(self.chunks(grid))
        return [Cell(n, chunk) for n in range(num_layers) for chunk in chunks]

    def residency(self, grid: Grid, num_layers: int) -> Residency:
        chunk = next(self.chunks(grid))
        waiting, frontier = grid.blocks - chunk.blocks, 2 * sum(frontier_blocks(grid, chunk))
        if not self.tokens_on_host:
            return Residency(chunk, device=waiting + frontier)
        # two slots for what comes, one of them counted with the chunk; and what leaves
        slots = min(2 * chunk.blocks, waiting)
        return Residency(chunk, slots + frontier, host=grid.blocks, moved=1.0)

    def __str__(self) -> str:
        m = self.blocks_per_chunk
        parts = [f"layer by layer, {m} block{'s' * (m > 1)} at a time"]
        parts += ["tokens in RAM"] * self.tokens_on_host
        return ", ".join([*parts, *_places(self)])


def _places(schedule: Schedule) -> list[str]:
    parts = ["LR keys not kept"] * (not schedule.keep_lr)
    parts += ["pictures in RAM"] * (schedule.pictures_device is not None)
    return parts + ["weights in RAM"] * schedule.stream_weights


def frontier_blocks(grid: Grid, chunk: Chunk) -> tuple[int, int]:
    """Blocks of a `Frontier`: the line above with the block before it; the last chunk's end."""
    chunk = grid.scanned(chunk)
    line = grid.line_blocks + 1 if chunk.rows < grid.lines else 0
    return line, chunk.rows if chunk.columns < grid.line_blocks else 0


def candidates(
    grid: Grid, best: float, *, host: bool, alone: bool, pictures: bool = True
) -> Iterator[Schedule]:
    """The schedules worth considering for a picture.

    Args:
        best: blocks of a chunk that run fastest; larger chunks take more memory and more time.
        host: whether the host's memory is another than the device's, so that things can wait there.
        alone: whether the solver's pictures and the network's weights may wait there too.
        pictures: whether there are pictures in memory that could.
    """
    longer, shorter = grid.lines, grid.line_blocks
    lengths = [n * shorter for n in _halvings(longer)]
    lengths += [blocks for blocks in _halvings(shorter) if blocks < shorter]
    sides = {side * side: side for side in _halvings(shorter)}
    orders = [(LayerMajor(n), "tokens_on_host") for n in _useful(lengths, best)]
    if grid.strip_of_columns is None:  # by blocks, each strip would wait for the whole of another
        orders += [(BlockMajor(sides[n]), "frontier_on_host") for n in _useful(sides, best)]
    if grid.blocks in _useful(lengths, best):
        yield Full()
    others = host and alone
    for order, on_host in orders:
        for keep_lr, waits, away, weights in product(
            (True, False), _choices(host), _choices(others and pictures), _choices(others)
        ):
            places = {on_host: waits, "keep_lr": keep_lr, "stream_weights": weights}
            yield replace(order, **places, pictures_device="cpu" if away else None)


def _choices(free: bool) -> tuple[bool, ...]:
    return (False, True) if free else (False,)


def _useful(sizes: Iterable[int], best: float) -> list[int]:
    """Of falling sizes those up to the best, and the one above."""
    larger = [n for n in sizes if n > best]
    return larger[-1:] + [n for n in sizes if n <= best]


def _halvings(n: int) -> Iterator[int]:
    while n >= 1:
        yield n
        n //= 2


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InfDiTError(f"{name}: expected at least 1, got {value}")
