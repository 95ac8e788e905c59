"""Orders of computation: which (chunk, layer) cell comes when, and where tokens wait meanwhile.

Layer n of a block reads only layer-n keys and values of its left-top, left and top neighbours, so
every order that takes chunks from the top left gives the same result. What differs is memory:

- `Full` keeps the tokens and one layer's activations of the whole picture.
- `BlockMajor` takes a square of blocks through all layers, keeping every layer's frontier.
- `LayerMajor` takes one layer over all chunks, keeping the tokens and one layer's frontier.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InfDiTError
from .grid import Chunk, Frontier, Grid
from .host_tokens import HostTokens


class Evaluation(Protocol):
    """One evaluation of the network, cut into cells. `model.Evaluation` implements it."""

    grid: Grid
    num_layers: int
    device: torch.device

    def run(self, schedule: Schedule) -> None:
        """Compute everything in the order of a schedule. Calling again begins again."""
        ...

    def stream_weights(self) -> None:
        """Keep the layers' weights on the host from now on."""
        ...

    def embed(self, chunk: Chunk) -> Tensor:
        """Tokens of a chunk: (B, r, c, T, hidden)."""
        ...

    def layer(self, n: int, tokens: Tensor, chunk: Chunk, frontier: Frontier) -> Tensor:
        """The tokens after layer n."""
        ...

    def write(self, tokens: Tensor, chunk: Chunk) -> None:
        """Turn the tokens of a chunk into pixels of the result."""
        ...


class Schedule(Protocol):
    """An order of computation."""

    def run(self, evaluation: Evaluation) -> None:
        """Embed, transform and write every chunk of the evaluation's grid."""
        ...

    def cells(self, grid: Grid, num_layers: int) -> int:
        """How many calls of `Evaluation.layer` a run makes."""
        ...

    @property
    def keep_lr(self) -> bool:
        """Whether the LR picture's keys and values are made once and kept for all evaluations."""
        ...

    @property
    def tokens_on_host(self) -> bool:
        """Whether tokens wait in the host's memory between layers."""
        ...

    @property
    def pictures_device(self) -> str | torch.device | None:
        """Where the solver's pictures live; None for the device of the model."""
        ...


class _OnDevice:
    """Everything lives on the device of the model."""

    keep_lr = True
    tokens_on_host = False
    pictures_device = None


@dataclass(frozen=True)
class Full(_OnDevice):
    """The whole picture at once: the most memory."""

    def run(self, evaluation: Evaluation) -> None:
        BlockMajor(blocks=max(evaluation.grid)).run(evaluation)

    def cells(self, grid: Grid, num_layers: int) -> int:
        return num_layers


@dataclass(frozen=True)
class BlockMajor(_OnDevice):
    """`blocks`×`blocks` blocks at a time through all layers (figure 3 of the paper).

    Keeps one line of blocks of keys and values per layer, along the shorter side of the picture.
    """

    blocks: int = 1

    def __post_init__(self) -> None:
        _require_positive("blocks", self.blocks)

    def run(self, evaluation: Evaluation) -> None:
        frontiers = [Frontier(evaluation.grid) for _ in range(evaluation.num_layers)]
        for chunk in evaluation.grid.chunks(self.blocks, self.blocks):
            tokens = evaluation.embed(chunk)
            for n, frontier in enumerate(frontiers):
                tokens = evaluation.layer(n, tokens, chunk, frontier)
            evaluation.write(tokens, chunk)

    def cells(self, grid: Grid, num_layers: int) -> int:
        return num_layers * sum(1 for _ in grid.chunks(self.blocks, self.blocks))


@dataclass(frozen=True)
class LayerMajor:
    """One layer at a time over the picture, `blocks_per_chunk` blocks at a time.

    Keeps the tokens of the picture and one line of blocks of keys and values of one layer.
    """

    blocks_per_chunk: int = 1
    tokens_on_host: bool = False
    """Tokens wait in the host's memory between layers, instead of that of the model's device."""
    keep_lr: bool = True
    """Off: keys and values of the LR picture are made anew for every chunk, 0.1 % of the work."""
    pictures_device: str | torch.device | None = None
    """Where the solver's pictures live; None for the device of the model."""
    stream_weights: bool = False
    """The layers' weights stay on the host and come to the device one layer at a time."""

    def __post_init__(self) -> None:
        _require_positive("blocks_per_chunk", self.blocks_per_chunk)

    def chunks(self, grid: Grid) -> list[Chunk]:
        """Parts of a line of blocks, or as many whole lines as a chunk holds."""
        lines, length = divmod(self.blocks_per_chunk, grid.shorter)
        return list(grid.chunks(lines, grid.shorter) if lines else grid.chunks(1, length))

    def run(self, evaluation: Evaluation) -> None:
        if self.stream_weights:
            evaluation.stream_weights()
        chunks = self.chunks(evaluation.grid)
        with self._tokens(evaluation.device, len(chunks)) as tokens:
            for chunk in chunks:
                tokens.append(evaluation.embed(chunk))
            for n in range(evaluation.num_layers):
                frontier = Frontier(evaluation.grid)
                for i, chunk in enumerate(chunks):
                    tokens[i] = evaluation.layer(n, tokens[i], chunk, frontier)
            for i, chunk in enumerate(chunks):
                evaluation.write(tokens[i], chunk)

    def _tokens(
        self, device: torch.device, count: int
    ) -> AbstractContextManager[list[Tensor] | HostTokens]:
        """Where the tokens of all chunks wait between layers."""
        return HostTokens(device, count) if self.tokens_on_host else nullcontext([])

    def cells(self, grid: Grid, num_layers: int) -> int:
        return num_layers * len(self.chunks(grid))


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InfDiTError(f"{name}: expected at least 1, got {value}")
