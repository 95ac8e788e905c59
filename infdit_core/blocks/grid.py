"""The picture as a grid of blocks, the chunks that are computed at a time, and what lies between.

A block attends to itself and to its left-top, left and top neighbours; at the edge of the picture
the nearest block inside takes the missing one's place. Work therefore goes in chunks from the top
left, and all that a later chunk needs of earlier ones is a `Frontier` of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InfDiTError
from .host_store import HostStore
from .link import Link

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

    def moved(self, rows: int, columns: int) -> Chunk:
        """This chunk so many blocks further down and to the right."""
        top, bottom, left, right = self
        return Chunk(top + rows, bottom + rows, left + columns, right + columns)

    def scaled(self, side: int) -> tuple[slice, slice]:
        """Row and column slices of this chunk where a block is `side` long."""
        return (
            slice(self.top * side, self.bottom * side),
            slice(self.left * side, self.right * side),
        )


class Grid(NamedTuple):
    """Block rows and columns of a picture, or of a strip of one."""

    rows: int
    columns: int
    strip_of_columns: bool | None = None
    """Of a strip: whether it is one of columns; None for a whole picture."""

    @property
    def blocks(self) -> int:
        return self.rows * self.columns

    @property
    def whole(self) -> Chunk:
        return Chunk(0, self.rows, 0, self.columns)

    @property
    def by_columns(self) -> bool:
        """Whether lines are columns: a wide picture is scanned so, for the shorter frontier.

        A strip is scanned as its picture is.
        """
        if self.strip_of_columns is not None:
            return self.strip_of_columns
        return self.columns > self.rows

    @property
    def line_blocks(self) -> int:
        """Blocks of a line, which the frontier spans: along the shorter side of a picture."""
        return self.rows if self.by_columns else self.columns

    @property
    def lines(self) -> int:
        """Lines of blocks, one after the other along the longer side of a picture."""
        return self.columns if self.by_columns else self.rows

    def strips(self, shares: Sequence[float]) -> list[Chunk]:
        """The picture in strips of whole lines, at least one each.

        Args:
            shares: how much of the picture each strip gets, in relation to each other.

        Raises:
            InfDiTError: there are fewer lines.
        """
        count = len(shares)
        if not 1 <= count <= self.lines:
            raise InfDiTError(
                f"expected at most as many strips as the picture's {self.lines} lines of blocks,"
                f" got {count}"
            )
        wanted = [self.lines * end / sum(shares) for end in accumulate(shares)]
        ends = [0]
        for n, end in enumerate(wanted, 1):
            ends.append(max(ends[-1] + 1, min(round(end), self.lines - (count - n))))
        lines = [Chunk(a, b, 0, self.line_blocks) for a, b in pairwise(ends)]
        return [self.scanned(strip) for strip in lines]

    def scanned(self, chunk: Chunk) -> Chunk:
        """A chunk with its columns along the lines, in which chunks follow each other."""
        return chunk.transposed if self.by_columns else chunk

    def chunks(self, depth: int, length: int) -> Iterator[Chunk]:
        """Chunks in scanning order: of `depth` lines, `length` blocks along them."""
        for slow in range(0, self.lines, depth):
            for fast in range(0, self.line_blocks, length):
                chunk = Chunk(
                    slow, min(slow + depth, self.lines), fast, min(fast + length, self.line_blocks)
                )
                yield self.scanned(chunk)


@dataclass(frozen=True)
class Strip:
    """A part of a picture that one device computes."""

    grid: Grid
    """Of the whole picture."""
    chunk: Chunk
    """One of its `strips`."""
    link: Link
    """To the strips before and after."""

    @property
    def own_grid(self) -> Grid:
        return Grid(self.chunk.rows, self.chunk.columns, self.grid.by_columns)

    def beside(self) -> list[Chunk]:
        """The lines before and after it that the picture has."""
        chunk, grid = self.grid.scanned(self.chunk), self.grid
        lines = [Chunk(n, n + 1, 0, grid.line_blocks) for n in (chunk.top - 1, chunk.bottom)]
        return [grid.scanned(line) for line in lines if 0 <= line.top < grid.lines]


class Frontier:
    """Keys and values of one layer: of the chunk at work, and what later chunks will read of them.

    They lie in lines of blocks, (2, B, blocks, ...) with keys first and the block before the line
    at index 0. A line is read where it was written: one that is a chunk by itself is never copied.

    Args:
        grid: of the picture, or of a strip.
        line: where the line above waits; here if None.
        layer: whose line it is there.
        link: to the strips before and after; None for a whole picture.
    """

    def __init__(
        self, grid: Grid, line: Line | None = None, layer: int = 0, link: Link | None = None
    ) -> None:
        self._grid, self._line, self._layer, self._link = grid, line, layer, link
        self._kept: dict[str, Tensor] = {}

    def room(self, like: Tensor, chunk: Chunk) -> Tensor:
        """Where a chunk's keys and values are to be written: (2, B, r, c, ...), uninitialised.

        Args:
            like: (B, r, c, ...) in the dtype and on the device of the keys.
            chunk: where that is; chunks come in the order of `Grid.chunks`.
        """
        by_columns, chunk = self.by_columns(chunk), self._scanned(chunk)
        shape = 2, len(like), chunk.rows, 1 + chunk.columns, *like.shape[3:]
        lines = self._kept["lines"] = like.new_empty(shape)
        inside = lines[:, :, :, 1:]
        return inside.transpose(2, 3) if by_columns else inside

    def neighbourhoods(self, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each line of the chunk that is written: its blocks, their left-top, left and top.

        Each is a view (2, B, blocks, ...), valid until `keep`.
        """
        by_columns, chunk = self.by_columns(chunk), self._scanned(chunk)
        lines = self._kept["lines"]
        lines[:, :, :, 0] = lines[:, :, :, 1] if chunk.left == 0 else self._kept["end"]
        above = self._above(chunk)
        for line in lines.unbind(2):
            left, top = line[:, :, :-1], above[:, :, 1:]
            if by_columns:
                left, top = top, left
            yield line[:, :, 1:], above[:, :, :-1], left, top
            above = line

    def keep(self, chunk: Chunk) -> None:
        """Let go what no later chunk will read, once the neighbourhoods have been used."""
        kept, whole = self._kept, chunk == self._grid.whole
        chunk, length = self._scanned(chunk), self._grid.line_blocks
        ends, last = whole or chunk.right == length, whole or chunk.bottom == self._grid.lines
        lines = kept.pop("lines")
        if last and self._link is not None and self._link.has_after:
            self._send(self._link, chunk, lines[:, :, -1, 1:], ends=ends)
        if last and ends:
            kept.clear()
            return
        if ends:
            kept.pop("received", None)
        else:
            kept["end"] = lines[:, :, :, -1].clone()
        if not last:
            self._keep_line(chunk, lines[:, :, -1], alone=chunk.rows == 1, ends=ends)

    def _above(self, chunk: Chunk) -> Tensor:
        """The line above a chunk, and the block before it: (2, B, 1 + blocks, ...)."""
        kept = self._kept
        if chunk.top == 0 and self._link is not None and self._link.has_before:
            if "received" not in kept:
                kept["received"] = self._receive(self._link)
            return kept["received"][:, :, chunk.left : chunk.right + 1]
        if chunk.top == 0:
            return kept["lines"][:, :, 0]
        if self._line is None:
            return kept["above"][:, :, chunk.left : chunk.right + 1]
        blocks = self._line.pop((self._layer, chunk.left))  # (2, B, blocks, ...)
        before = blocks[:, :, :1] if chunk.left == 0 else kept["corner"]
        kept["corner"] = blocks[:, :, -1:].clone()
        return torch.cat([before, blocks], dim=2)

    def _receive(self, link: Link) -> Tensor:
        """The last line of the strip before, and the block before it: (2, B, 1 + blocks, ...)."""
        lines = self._kept["lines"]  # (2, B, r, 1 + c, ...)
        line = lines.new_empty(*lines.shape[:2], 1 + self._grid.line_blocks, *lines.shape[4:])
        link.receive(self._layer, line[:, :, 1:])
        line[:, :, 0] = line[:, :, 1]
        return line

    def _send(self, link: Link, chunk: Chunk, line: Tensor, *, ends: bool) -> None:
        """Send the last line of a strip, of which `line` (2, B, blocks, ...) is the chunk's."""
        kept, length = self._kept, self._grid.line_blocks
        if chunk.columns == length:
            link.send(self._layer, line)
            return
        if "below" not in kept:
            kept["below"] = line.new_empty(*line.shape[:2], length, *line.shape[3:])
        kept["below"][:, :, chunk.left : chunk.right] = line
        if ends:
            link.send(self._layer, kept.pop("below"))

    def _keep_line(self, chunk: Chunk, line: Tensor, *, alone: bool, ends: bool) -> None:
        """Keep the last line of a chunk, (2, B, 1 + blocks, ...)."""
        kept, length = self._kept, self._grid.line_blocks
        if self._line is not None:
            blocks = line[:, :, 1:].clone(memory_format=torch.contiguous_format)
            self._line[self._layer, chunk.left] = blocks
        elif chunk.columns == length:
            kept["above"] = line if alone else line.clone()
        else:
            if "above" not in kept:
                shape = line.shape
                kept["above"] = line.new_empty(*shape[:2], 1 + length, *shape[3:])
            # what lies above the last block is still to be read, by the next chunk
            blocks = chunk.columns + ends
            kept["above"][:, :, chunk.left : chunk.left + blocks] = line[:, :, :blocks]

    def by_columns(self, chunk: Chunk) -> bool:
        """Whether the lines of a chunk are columns.

        They lie along the shorter side of the picture, those of a picture in one chunk along the
        longer: few and long.
        """
        grid = self._grid
        if chunk != grid.whole or grid.strip_of_columns is not None:
            return grid.by_columns
        return grid.rows > grid.columns

    def _scanned(self, chunk: Chunk) -> Chunk:
        """A chunk with rows along the lines."""
        return chunk.transposed if self.by_columns(chunk) else chunk
