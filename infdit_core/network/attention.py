"""Attention between blocks: what computes it, and the neighbourhoods it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fast
from .backends import Backend, fastest

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q·kᵀ/√d)·v for q (N, A, S, d) and k, v (N, A, T, d), giving (N, A, S, d)."""
Neighbourhood = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values (2, B, c, T, A, d) of c blocks, of their left-top, left and top neighbours."""


class Attention:
    """PyTorch's scaled dot product attention, to all keys or to a part of them."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend = fastest(q, k, v) if fast.uses("backends", q) else None
        return backend(q, k, v)[0] if backend else F.scaled_dot_product_attention(q, k, v)

    def for_parts(self, q: Tensor, k: Tensor, v: Tensor) -> Backend | None:
        """What attends to parts of the keys of this kind; None where all at once is better."""
        return fastest(q, k, v) if fast.uses("join", q) else None


sdpa = Attention()


def block_attention(
    q: Tensor, neighbourhoods: Iterable[Neighbourhood], segment_embed: Tensor, attend: Attend = sdpa
) -> Tensor:
    """Each block attends to itself and its left-top, left and top neighbours.

    Args:
        q: (B, n, c, T, A, d) queries of n lines of c blocks of T tokens.
        neighbourhoods: of each line.
        segment_embed: (4, A, d) added to the keys of each neighbour.
        attend: the attention; where it is an `Attention`, perhaps to each neighbour by itself.

    Returns:
        (B, n, c, T, A, d).
    """
    lines = []
    for line, neighbours in zip(q.unbind(1), neighbourhoods, strict=True):
        out = _joined(line, neighbours, segment_embed, attend)
        if out is None:
            out = _gathered(line, neighbours, segment_embed, attend)
        lines.append(out)
    return lines[0].unsqueeze(1) if len(lines) == 1 else torch.stack(lines, dim=1)


def _gathered(
    q: Tensor, neighbours: Neighbourhood, segment_embed: Tensor, attend: Attend
) -> Tensor:
    """One line (B, c, T, A, d), with the neighbours' keys and values side by side.

    The fourfold copy of one line stays small beside a chunk.
    """
    # (B, c, A, 4·T, d): a CPU attends a seventh faster where the rows of a head lie together
    k, v = (torch.cat([kv[i].transpose(2, 3) for kv in neighbours], dim=3) for i in (0, 1))
    k.unflatten(3, (4, -1)).add_(segment_embed.transpose(0, 1).unsqueeze(2))
    out = attend(q.flatten(0, 1).transpose(1, 2), k.flatten(0, 1), v.flatten(0, 1))
    return out.transpose(1, 2).unflatten(0, q.shape[:2])  # (B·c, A, T, d) -> (B, c, T, A, d)


def _joined(
    q: Tensor, neighbours: Neighbourhood, segment_embed: Tensor, attend: Attend
) -> Tensor | None:
    """One line (B, c, T, A, d), with the neighbours where they are; None where that is no gain.

    q·(k + e) = q·k + q·e: what a neighbour's keys have added to them is one number for a query. So
    the attention to all four is that to each, weighted by the exponential of its log-sum-exp and
    this number.
    """
    heads_first = [[x.transpose(2, 3) for x in kv] for kv in neighbours]  # (B, c, A, T, d) each
    for_parts = getattr(attend, "for_parts", None)
    part = for_parts and for_parts(q[0].transpose(1, 2), *(x[0] for x in heads_first[0]))
    if part is None:
        return None
    from .kernels import join  # Triton is there where this way is used

    joined = torch.empty_like(q)
    for i in range(len(q)):
        parts = [part(q[i].transpose(1, 2), k[i], v[i]) for k, v in heads_first]
        outs, lses = zip(*parts, strict=True)  # (c, A, T, d) and (c, A, T)
        join(q[i], outs, lses, segment_embed, joined[i])
    return joined
