"""Attention between blocks: one function that computes it, and the neighbourhoods it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q·kᵀ/√d)·v for q (N, A, S, d) and k, v (N, A, T, d), giving (N, A, S, d)."""
Neighbourhood = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values (2, B, c, T, A, d) of c blocks, of their left-top, left and top neighbours."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot product attention."""
    return F.scaled_dot_product_attention(q, k, v)


def block_attention(
    q: Tensor, neighbourhoods: Iterable[Neighbourhood], segment_embed: Tensor, attend: Attend = sdpa
) -> Tensor:
    """Each block attends to itself and its left-top, left and top neighbours.

    The four neighbours are put side by side for one line of blocks at a time, so that the
    fourfold copy of keys and values stays small beside the chunk.

    Args:
        q: (B, n, c, T, A, d) queries of n lines of c blocks of T tokens.
        neighbourhoods: of each line; keys and values (2, B, c, T, A, d).
        segment_embed: (4, A, d) added to the keys of each neighbour.

    Returns:
        (B, n, c, T, A, d).
    """
    lines = [
        _gathered(line, segments, segment_embed, attend)
        for line, segments in zip(q.unbind(1), neighbourhoods, strict=True)
    ]
    return lines[0].unsqueeze(1) if len(lines) == 1 else torch.stack(lines, dim=1)


def _gathered(q: Tensor, segments: Neighbourhood, segment_embed: Tensor, attend: Attend) -> Tensor:
    """One line (B, c, T, A, d), with the neighbours' keys and values side by side."""
    k = torch.cat([s[0] for s in segments], dim=2)  # (B, c, 4·T, A, d)
    k.unflatten(2, (4, -1)).add_(segment_embed.unsqueeze(1))
    v = torch.cat([s[1] for s in segments], dim=2)
    out = attend(*(x.flatten(0, 1).transpose(1, 2) for x in (q, k, v)))  # (B·c, A, T, d)
    return out.transpose(1, 2).unflatten(0, q.shape[:2])
