"""Two-dimensional rotary position embedding, as complex factors per row and per column."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_factors(positions: Tensor, head_dim: int) -> Tensor:
    """exp(i · position · frequency): complex64 (n, head_dim / 4) for positions (n,).

    The same frequencies serve rows and columns, each of which turns half of the head.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions.float()[:, None] * 10000.0**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Turn adjacent pairs of a head: the first half by the row, the second by the column.

    Args:
        x: (B, r, c, b, b, A, d) queries or keys of r×c blocks of b×b patches.
        rows: (r, b, d/4) complex factors of the patch rows of these blocks.
        columns: (c, b, d/4) complex factors of their patch columns.

    Returns:
        x turned, in the dtype of x; computed in float32, and in place where x is float32.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    half = pairs.shape[-1] // 2
    pairs[..., :half] *= rows[:, None, :, None, None]
    pairs[..., half:] *= columns[None, :, None, :, None]
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)
