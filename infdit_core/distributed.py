"""One picture on several devices: by torch.distributed, a process each, or in threads of one.

Each samples a strip of whole lines of blocks with a solver of its own. All that goes between them
while they sample is a line of keys and values per layer, to the next strip, so none waits for the
others once the first lines have come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks.grid import Chunk, Grid, Strip
from .blocks.strips import in_strips
from .errors import InfDiTError
from .network.model import InfDiT
from .pictures.prepare import Canvas, Wrap
from .sampling import gaussian
from .upscale import Sampler

_UNDER_WAY = 2
"""Lines that a process may be ahead of the next: each is memory of its device."""


class DistributedLink:
    """The way to the strips of the ranks before and after.

    Args:
        rank: of this process.
        ranks: that have a strip.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.has_before, self.has_after = rank > 0, rank + 1 < ranks
        self._rank = rank
        self._leaving: deque[tuple[dist.Work | None, Tensor]] = deque()
        self.sent_bytes = 0

    def receive(self, layer: int, out: Tensor) -> None:
        line = torch.empty_like(out, memory_format=torch.contiguous_format)
        dist.recv(line, self._rank - 1, tag=layer)
        out.copy_(line)

    def send(self, layer: int, line: Tensor) -> None:
        line = line.clone(memory_format=torch.contiguous_format)
        self._leaving.append((dist.isend(line, self._rank + 1, tag=layer), line))
        self.sent_bytes += line.nbytes
        self.flush(_UNDER_WAY)

    def flush(self, left: int = 0) -> None:
        """Wait until only so many lines are under way."""
        while len(self._leaving) > left:
            work, _ = self._leaving.popleft()
            if work is not None:
                work.wait()


@dataclass
class LocalStripSampler(Sampler):
    """A `Sampler` of several devices of this process: each draws a strip, in a thread of its own.

    The picture is that of one `Sampler`, to the bit.
    """

    others: Sequence[InfDiT] = ()
    """Copies of the model, on the other devices."""

    def __call__(self, canvas: Canvas) -> Tensor:
        px, grid = self.block_px, _grid(canvas, self.block_px)
        models = [self.model, *self.others][: grid.lines]
        devices = [model.device for model in models]
        own = dict(zip(grid.strips([1] * len(models)), models, strict=True))
        result = torch.empty_like(canvas.concat, dtype=torch.float32, device="cpu")

        def compute(strip: Strip, _: torch.device) -> None:
            settings: dict[str, Any] = {
                f.name: getattr(self, f.name) for f in fields(Sampler) if f.init
            }
            settings["model"] = own[strip.chunk]
            sampler = Sampler(**settings)
            if strip.link.has_after:  # the last strip is done last, and tells how far all are
                sampler.callback = sampler.progress = None
            place = strip.chunk.scaled(px)
            noise = _noise(canvas, self.seed, *place)
            result[(..., *place)] = sampler.draw(_part(canvas, strip, px), noise, strip)

        in_strips(grid, devices, compute)
        return result


@dataclass
class StripSampler(Sampler):
    """A `Sampler` of all processes of the default group together: each draws a strip.

    All are called with the same canvas, and all get the whole picture: that of one `Sampler`, to
    the bit.
    """

    sent_bytes: int = field(default=0, init=False)
    """Keys and values that this process has sent so far."""

    def __call__(self, canvas: Canvas) -> Tensor:
        px, grid = self.block_px, _grid(canvas, self.block_px)
        ranks = min(dist.get_world_size(), grid.lines)
        chunks, rank = grid.strips([1] * ranks), dist.get_rank()
        own = None
        if rank < ranks:
            link = DistributedLink(rank, ranks)
            strip = Strip(grid, chunks[rank], link)
            noise = _noise(canvas, self.seed, *strip.chunk.scaled(px))
            own = self.draw(_part(canvas, strip, px), noise, strip)
            link.flush()
            self.sent_bytes += link.sent_bytes
        return self._gathered(own, canvas.concat, chunks)

    def _gathered(self, own: Tensor | None, like: Tensor, chunks: list[Chunk]) -> Tensor:
        """The picture (B, 3, H, W) of the strips of all ranks."""
        # NCCL takes what lies on its GPU
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        result = torch.empty_like(like, dtype=torch.float32, device="cpu")
        for rank, chunk in enumerate(chunks):
            place = result[(..., *chunk.scaled(self.block_px))]
            piece = torch.empty(place.shape, device=device)
            if own is not None and rank == dist.get_rank():
                piece.copy_(own)
            dist.broadcast(piece, rank)
            place.copy_(piece)
        return result


def _grid(canvas: Canvas, block_px: int) -> Grid:
    height, width = canvas.concat.shape[-2:]
    return Grid(height // block_px, width // block_px)


def _noise(canvas: Canvas, seed: int, rows: slice, columns: slice) -> Tensor:
    """(B, 3, rows, columns) of what a `Sampler` draws for the whole canvas."""
    shape = (*canvas.concat.shape[:2], *(canvas.noise_size or canvas.concat.shape[-2:]))
    drawn = torch.cat(list(gaussian(shape, seed, rows)))
    return drawn.view(*shape[:2], -1, shape[-1])[..., columns]


def _part(canvas: Canvas, strip: Strip, block_px: int) -> Canvas:
    """A strip of a canvas, with the LR picture whole.

    Raises:
        InfDiTError: the edges that the picture goes on around lie in different strips.
    """
    rows, columns = strip.chunk.scaled(block_px)
    wrap = canvas.wrap
    if wrap is not None:
        by_columns = strip.grid.by_columns
        if (wrap.columns if by_columns else wrap.rows) is not None:
            raise InfDiTError(
                "expected no wrap along the longer side of a picture in strips; take one GPU"
            )
        wrap = Wrap(wrap.rows, None) if by_columns else Wrap(None, wrap.columns)

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., rows, columns]

    return replace(
        canvas,
        concat=canvas.concat[..., rows, columns],
        start=part(canvas.start),
        mask=part(canvas.mask),
        wrap=wrap,
    )
