"""Attention between blocks: one function that computes it, and the neighbourhoods it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q·kᵀ/√d)·v for q (N, A, S, d) and k, v (N, A, T, d), giving (N, A, S, d)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot product attention."""
    return F.scaled_dot_product_attention(q, k, v)


def block_attention(
    q: Tensor, bordered: Tensor, segment_embed: Tensor, attend: Attend = sdpa
) -> Tensor:
    """Each block attends to itself and its left-top, left and top neighbours.

    The four neighbourhoods are put side by side for one row of blocks at a time, so that the
    fourfold copy of keys and values stays small beside the chunk.

    Args:
        q: (B, r, c, A, T, d) queries of r×c blocks of T tokens.
        bordered: (2, B, r + 1, c + 1, A, T, d) keys and values with the blocks above and to the
            left of the chunk at index 0.
        segment_embed: (4, A, d) added to the keys of each neighbour.

    Returns:
        (B, r, c, T, A, d).
    """
    rows = []
    for i in range(q.shape[1]):
        above, same = bordered[:, :, i], bordered[:, :, i + 1]
        segments = same[:, :, 1:], above[:, :, :-1], same[:, :, :-1], above[:, :, 1:]
        k = torch.cat([s[0] for s in segments], dim=-2)  # (B, c, A, 4·T, d)
        k.unflatten(-2, (4, -1)).add_(segment_embed.transpose(0, 1).unsqueeze(2))
        v = torch.cat([s[1] for s in segments], dim=-2)
        out = attend(q[:, i].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # (B·c, A, T, d)
        rows.append(out.unflatten(0, k.shape[:2]).transpose(2, 3))
    return torch.stack(rows, dim=1)
