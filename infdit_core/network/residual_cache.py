"""Reuse of what the last layers add to the tokens, from one evaluation to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks.grid import Chunk
from ..errors import InfDiTError


@dataclass
class ResidualCache:
    """What the last layers of one evaluation added, for evaluations at nearly the same sigma.

    Heun's method evaluates twice at each noise level, at almost the same picture: the second time
    the last layers are left out and what they added the first time is added again. A wider
    `tolerance` lets solvers of one evaluation a step reuse it too. Not exact; one cache serves one
    sampling run. The idea is that of DeepCache (arXiv 2312.00858), for transformers.
    """

    layers: int
    """How many of the last layers are left out."""
    tolerance: float = 0.0
    """How far ln(sigma) may be from that of the evaluation that is reused."""

    reused: int = field(default=0, init=False)
    """Evaluations that reused it so far."""
    _on_host: bool = field(default=False, init=False, repr=False)
    _reusing: bool = field(default=False, init=False, repr=False)
    _kept_layers: int = field(default=0, init=False, repr=False)
    _residual: Tensor | None = field(default=None, init=False, repr=False)
    _sigma: float = field(default=1.0, init=False, repr=False)
    _missing: int = field(default=-1, init=False, repr=False)
    """Blocks of the residual that are still to be computed; -1 before the first evaluation."""
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layers < 1 or self.tolerance < 0:
            raise InfDiTError(
                "expected at least 1 layer and a tolerance of at least 0,"
                f" got {self.layers} and {self.tolerance}"
            )

    def begin(
        self, sigma: float, shape: tuple[int, ...], num_layers: int, on_host: bool = False
    ) -> int:
        """Say what comes; returns the number of layers to compute.

        Args:
            sigma: the noise level of the evaluation.
            shape: (B, block rows, block columns, T, hidden) of all tokens.
            num_layers: of the network.
            on_host: whether the residual is to lie in the host's memory.

        Raises:
            InfDiTError: the network has no more layers than are to be left out.
        """
        if self.layers >= num_layers:
            raise InfDiTError(
                f"expected fewer layers to leave out than the model's {num_layers},"
                f" got {self.layers}"
            )
        self._on_host, self._kept_layers = on_host, num_layers - self.layers
        complete = self._missing == 0 and self._shape == shape
        self._reusing = complete and abs(math.log(sigma / self._sigma)) <= self.tolerance
        if self._reusing:
            self.reused += 1
            return self._kept_layers
        self._shape, self._sigma, self._missing = shape, sigma, shape[1] * shape[2]
        return num_layers

    def after(self, n: int, tokens: Tensor, chunk: Chunk) -> Tensor:
        """The tokens (B, r, c, T, hidden) of a chunk after layer n, in every evaluation.

        Where layers are left out, what they added is added after the last one that is computed.
        """
        if n + 1 == self._kept_layers:
            if self._reusing:
                return tokens + self._at(chunk).to(tokens.device)
            device = torch.device("cpu") if self._on_host else tokens.device
            kept = self._residual
            if kept is None or kept.shape != self._shape or kept.device != device:
                self._residual = kept = None  # lets it go before the next one comes
                self._residual = torch.empty(self._shape, dtype=tokens.dtype, device=device)
            self._at(chunk).copy_(tokens)
        elif n + 1 == self._kept_layers + self.layers:
            residual = self._at(chunk)
            residual.copy_(tokens - residual.to(tokens.device))
            self._missing -= chunk.blocks
        return tokens

    def _at(self, chunk: Chunk) -> Tensor:
        if self._residual is None:
            raise RuntimeError("no evaluation has been kept yet")
        rows, columns = chunk.scaled(1)
        return self._residual[:, rows, columns]
