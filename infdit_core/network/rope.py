"""Two-dimensional rotary position embedding: complex numbers per row and per column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.grid import Chunk

_COMPLEX = {"cpu", "cuda", "xpu", "meta"}
"""Types of devices with complex numbers; MPS and DirectML have none, nor has the compiler."""


class Rotary(NamedTuple):
    """Rotary factors of the patch rows and columns of blocks of `side` patches."""

    rows: Tensor
    """(block rows, side, d/4, 2)"""
    columns: Tensor
    """(block columns, side, d/4, 2)"""

    def of(self, chunk: Chunk) -> Rotary:
        """The factors of a chunk of blocks."""
        rows, columns = chunk.scaled(1)
        return Rotary(self.rows[rows], self.columns[columns])


def rotary_factors(positions: Tensor, head_dim: int) -> Tensor:
    """exp(i · position · frequency) as (n, head_dim / 4, 2) float32 for positions (n,).

    The same frequencies serve rows and columns, each of which turns half of the head.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions.float()[:, None] * 10000.0**-exponents
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn adjacent pairs of a head: the first half by the row, the second by the column.

    Args:
        x: (B, r, c, T, A, d) queries or keys of r×c blocks.
        rotary: factors of these blocks.

    Returns:
        x turned, in float32; in place where x is float32.
    """
    side = rotary.rows.shape[1]
    rows, columns = rotary.rows[:, None, :, None, None], rotary.columns[None, :, None, :, None]
    pairs = x.float().unflatten(-1, (-1, 2)).unflatten(3, (side, side))
    # (B, r, c, b, b, A, d/2, 2)
    half = pairs.shape[-2] // 2
    if torch.compiler.is_compiling() or x.device.type not in _COMPLEX:
        first, second = pairs.split(half, dim=-2)
        pairs = torch.cat([_turn(first, rows), _turn(second, columns)], dim=-2)
    else:
        turned = torch.view_as_complex(pairs)
        turned[..., :half] *= torch.view_as_complex(rows)
        turned[..., half:] *= torch.view_as_complex(columns)
    return pairs.flatten(-2).flatten(3, 4)


def _turn(pairs: Tensor, factors: Tensor) -> Tensor:
    """The product of complex numbers (..., 2) in real arithmetic."""
    (x, y), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
