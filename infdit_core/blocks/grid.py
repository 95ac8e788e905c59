"""The picture as a grid of blocks, the chunks that are computed at a time, and what lies between.

A block attends to itself and to its left-top, left and top neighbours; at the edge of the picture
the nearest block inside takes the missing one's place. Work therefore goes in chunks from the top
left, and all that a later chunk needs of earlier ones is a `Frontier` of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .host_store import HostStore

Line = HostStore[tuple[int, int]]
"""Keys and values of lines of blocks by layer and first block."""


class Chunk(NamedTuple):
    """A rectangle of blocks, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def blocks(self) -> int:
        return self.rows * self.columns

    @property
    def transposed(self) -> Chunk:
        return Chunk(self.left, self.right, self.top, self.bottom)

    def grown(self, blocks: int) -> Chunk:
        """This chunk and so many blocks around it."""
        top, bottom, left, right = self
        return Chunk(top - blocks, bottom + blocks, left - blocks, right + blocks)

    def within(self, other: Chunk) -> Chunk:
        """The part of this chunk that lies in another."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        return Chunk(top, bottom, max(self.left, other.left), min(self.right, other.right))

    def seen_from(self, other: Chunk) -> Chunk:
        """This chunk where the first block of another is block 0."""
        top, bottom = self.top - other.top, self.bottom - other.top
        return Chunk(top, bottom, self.left - other.left, self.right - other.left)

    def scaled(self, side: int) -> tuple[slice, slice]:
        """Row and column slices of this chunk where a block is `side` long."""
        return (
            slice(self.top * side, self.bottom * side),
            slice(self.left * side, self.right * side),
        )


class Grid(NamedTuple):
    """Block rows and columns of a picture."""

    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        return self.rows * self.columns

    @property
    def whole(self) -> Chunk:
        return Chunk(0, self.rows, 0, self.columns)

    @property
    def by_columns(self) -> bool:
        """Whether a wide picture is scanned column by column, for the shorter frontier."""
        return self.columns > self.rows

    @property
    def shorter(self) -> int:
        """Blocks along the shorter side, which the frontier spans."""
        return min(self.rows, self.columns)

    def scanned(self, chunk: Chunk) -> Chunk:
        """A chunk with columns along the shorter side, across which chunks follow each other."""
        return chunk.transposed if self.by_columns else chunk

    def chunks(self, depth: int, length: int) -> Iterator[Chunk]:
        """Chunks in scanning order: `depth` blocks along the longer side, `length` across."""
        longer = max(self.rows, self.columns)
        for slow in range(0, longer, depth):
            for fast in range(0, self.shorter, length):
                chunk = Chunk(
                    slow, min(slow + depth, longer), fast, min(fast + length, self.shorter)
                )
                yield chunk.transposed if self.by_columns else chunk


class Frontier:
    """Keys and values of one layer that chunks still to come will read.

    Holds one line of blocks along the shorter side of the picture, the end of the last chunk, and
    the one block diagonal to the next chunk. Tensors are (2, B, rows, columns, ...): keys, values.

    Args:
        grid: of the picture.
        line: where the line waits; here if None.
        layer: whose line it is there.
    """

    def __init__(self, grid: Grid, line: Line | None = None, layer: int = 0) -> None:
        self._grid, self._line, self._layer = grid, line, layer
        self._kept: dict[str, Tensor] = {}

    def exchange(self, bordered: Tensor, chunk: Chunk) -> None:
        """Fill the border of a chunk's keys and values, and keep what later chunks need.

        Args:
            bordered: (2, B, rows + 1, columns + 1, ...) with the chunk itself at [1:, 1:]; the
                border row and column are written here.
            chunk: where that is; chunks come in the order of `Grid.chunks`.
        """
        kept, length = self._kept, self._grid.shorter
        longer = max(self._grid)
        if self._grid.by_columns:
            bordered = bordered.transpose(2, 3)
        chunk = self._grid.scanned(chunk)

        if chunk.top == 0:
            bordered[:, :, 0, 1:] = bordered[:, :, 1, 1:]
        else:
            bordered[:, :, 0, 1:] = self._above(chunk)
        if chunk.left == 0:
            bordered[:, :, :, 0] = bordered[:, :, :, 1]
        else:
            bordered[:, :, 1:, 0] = kept["end"]
            bordered[:, :, 0, 0] = kept["end"][:, :, 0] if chunk.top == 0 else kept["corner"]

        if chunk.right < length:
            kept["end"] = bordered[:, :, 1:, -1].clone()
            kept["corner"] = bordered[:, :, 0, -1].clone()
        if chunk.bottom < longer:
            self._keep_line(chunk, bordered[:, :, -1, 1:])
        elif chunk.right == length:
            kept.clear()  # that was the last chunk

    def _above(self, chunk: Chunk) -> Tensor:
        """The line above a chunk: (2, B, columns, ...)."""
        if self._line is not None:
            return self._line.pop((self._layer, chunk.left))
        return self._kept["line"][:, :, chunk.left : chunk.right]

    def _keep_line(self, chunk: Chunk, blocks: Tensor) -> None:
        """Keep the last line of a chunk: (2, B, columns, ...)."""
        if self._line is not None:
            self._line[self._layer, chunk.left] = blocks.clone(
                memory_format=torch.contiguous_format
            )
            return
        if chunk.top == 0 and chunk.left == 0:
            shape = *blocks.shape[:2], self._grid.shorter, *blocks.shape[3:]
            self._kept["line"] = blocks.new_empty(shape)
        self._kept["line"][:, :, chunk.left : chunk.right] = blocks
