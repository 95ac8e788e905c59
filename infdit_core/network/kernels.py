"""Two Triton kernels, for what PyTorch computes in many passes over memory.

They are operators of PyTorch, so that fake tensors, the compiler and the planner see through them.
Imported where they are used only: Triton is not everywhere, and takes its time.
"""

from collections.abc import Sequence  # annotations are read by custom_op, so no future ones
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("infdit::place", mutates_args=("room",))
def place(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    columns: Tensor,
    room: Tensor,
    eps: float,
) -> Tensor:
    """Normalise and rotate queries and keys, and put keys and values where they are kept.

    Args:
        qkv: (B, r, c, T, 3, A, d), contiguous.
        weight, bias: (d,) of the LayerNorm of queries and keys.
        rows, columns: (r or c, side, d/4, 2) float32 rotary factors.
        room: (2, B, r, c, T, A, d), each block contiguous.

    Returns:
        (B, r, c, T, A, d) queries.
    """
    b, r, c, t, _, heads, d = qkv.shape
    q = qkv.new_empty(b, r, c, t, heads, d)
    launch: Any = _place[(b * r * c * t,)]
    with _current(qkv.device):
        launch(
            qkv, weight, bias, rows, columns, q, room, *room.stride()[:4],
            r, c, t, rows.shape[1], eps, **_tile(heads, d),
        )  # fmt: skip
    return q


@place.register_fake
def _(qkv, weight, bias, rows, columns, room, eps):
    b, r, c, t, _, heads, d = qkv.shape
    return qkv.new_empty(b, r, c, t, heads, d)


@triton.jit
def _place(
    qkv, weight, bias, rows, columns, q, room, stride_kv, stride_b, stride_r, stride_c,
    R, C, T, SIDE, EPS,
    HEADS: tl.constexpr, DIM: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_DIM: tl.constexpr,
):  # fmt: skip
    """One token."""
    n = tl.program_id(0).to(tl.int64)
    t, block = n % T, n // T
    i, j = (block // C) % R, block % C
    home = room + block // (R * C) * stride_b + i * stride_r + j * stride_c + t * HEADS * DIM

    head, dim = tl.arange(0, ALL_HEADS)[:, None], tl.arange(0, ALL_DIM)[None, :]
    inside = dim < DIM
    mask = (head < HEADS) & inside
    other = dim ^ 1  # the other number of the pair
    at, other_at = head * DIM + dim, head * DIM + other

    # the first half of a head turns with the row, the second with the column
    by_row = dim < DIM // 2
    factor = dim // 2 * 2
    row = rows + (i * SIDE + t // SIDE) * (DIM // 2) + factor
    column = columns + (j * SIDE + t % SIDE) * (DIM // 2) + factor - DIM // 2
    by_column = inside & (dim >= DIM // 2)
    cos = tl.load(row, by_row, 0.0) + tl.load(column, by_column, 0.0)
    sin = tl.load(row + 1, by_row, 0.0) + tl.load(column + 1, by_column, 0.0)
    sin = tl.where(dim % 2 == 0, -sin, sin)

    w = tl.load(weight + dim, inside, 0.0).to(tl.float32)
    w_other = tl.load(weight + other, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + dim, inside, 0.0).to(tl.float32)
    shift_other = tl.load(bias + other, inside, 0.0).to(tl.float32)
    for part in tl.static_range(2):  # pyright: ignore
        source = qkv + (n * 3 + part) * HEADS * DIM
        x = tl.load(source + at, mask, 0.0).to(tl.float32)
        y = tl.load(source + other_at, mask, 0.0).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / DIM
        x = tl.where(mask, x - mean, 0.0)
        scale = 1 / tl.sqrt(tl.sum(x * x, 1)[:, None] / DIM + EPS)
        turned = (x * scale * w + shift) * cos + ((y - mean) * scale * w_other + shift_other) * sin
        target = home if part else q + n * HEADS * DIM
        tl.store(target + at, turned.to(q.dtype.element_ty), mask)
    value = tl.load(qkv + (n * 3 + 2) * HEADS * DIM + at, mask, 0.0)
    tl.store(home + stride_kv + at, value, mask)


@torch.library.custom_op("infdit::join", mutates_args=("joined",))
def join(
    q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], embed: Tensor, joined: Tensor
) -> None:
    """Attention to four parts of the keys as attention to all of them.

    Args:
        q: (c, T, A, d) queries, each block contiguous.
        outs, lses: (c, A, T, d) attention to each part and (c, A, T) log-sum-exp of its scores.
        embed: (4, A, d) added to the keys of each part, contiguous.
        joined: (c, T, A, d) where the result is written, each block contiguous.
    """
    c, t, heads, d = q.shape
    launch: Any = _join[(c * t,)]
    with _current(q.device):
        launch(
            q, *outs, *lses, embed, joined, q.stride(0), joined.stride(0),
            *outs[0].stride()[:3], *lses[0].stride()[:3], t, d**-0.5, **_tile(heads, d),
        )  # fmt: skip


@join.register_fake
def _(q, outs, lses, embed, joined):
    return None


@triton.jit
def _join(
    q, o0, o1, o2, o3, l0, l1, l2, l3, embed, joined, q_stride, joined_stride,
    o_stride_n, o_stride_a, o_stride_t, l_stride_n, l_stride_a, l_stride_t, T, SCALE,
    HEADS: tl.constexpr, DIM: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_DIM: tl.constexpr,
):  # fmt: skip
    """One token: q·(k + e) = q·k + q·e, so e adds one number to the log-sum-exp of a part."""
    n = tl.program_id(0).to(tl.int64) // T
    t = tl.program_id(0).to(tl.int64) % T
    head, dim = tl.arange(0, ALL_HEADS)[:, None], tl.arange(0, ALL_DIM)[None, :]
    mask = (head < HEADS) & (dim < DIM)
    at = head * DIM + dim
    queries = tl.load(q + n * q_stride + t * HEADS * DIM + at, mask, 0.0).to(tl.float32) * SCALE
    out_at = n * o_stride_n + head * o_stride_a + t * o_stride_t + dim
    lse_at = n * l_stride_n + head * l_stride_a + t * l_stride_t

    s0 = _score(queries, embed, l0 + lse_at, at, head < HEADS, mask)
    s1 = _score(queries, embed + HEADS * DIM, l1 + lse_at, at, head < HEADS, mask)
    s2 = _score(queries, embed + 2 * HEADS * DIM, l2 + lse_at, at, head < HEADS, mask)
    s3 = _score(queries, embed + 3 * HEADS * DIM, l3 + lse_at, at, head < HEADS, mask)
    top = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    w0, w1, w2, w3 = tl.exp(s0 - top), tl.exp(s1 - top), tl.exp(s2 - top), tl.exp(s3 - top)
    total = w0 * tl.load(o0 + out_at, mask, 0.0).to(tl.float32)
    total += w1 * tl.load(o1 + out_at, mask, 0.0).to(tl.float32)
    total += w2 * tl.load(o2 + out_at, mask, 0.0).to(tl.float32)
    total += w3 * tl.load(o3 + out_at, mask, 0.0).to(tl.float32)
    total /= w0 + w1 + w2 + w3
    target = joined + n * joined_stride + t * HEADS * DIM + at
    tl.store(target, total.to(joined.dtype.element_ty), mask)


@triton.jit
def _score(queries, embed, lse, at, real, mask):
    """Of a part: the log-sum-exp of the scores of its keys with e added to each, (heads, 1)."""
    e = tl.load(embed + at, mask, 0.0).to(tl.float32)
    return tl.sum(queries * e, 1)[:, None] + tl.load(lse, real, 0.0)


def _tile(heads: int, d: int) -> dict[str, Any]:
    """The heads of a token, and the powers of two that Triton wants."""
    powers = triton.next_power_of_2(heads), triton.next_power_of_2(d)
    return {"HEADS": heads, "DIM": d, "ALL_HEADS": powers[0], "ALL_DIM": powers[1]}


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def try_out(device: torch.device) -> None:
    """Run both kernels once on next to nothing; raises what a device without Triton raises."""
    x = torch.zeros(1, 1, 1, 1, 3, 1, 4, device=device)
    row, room = torch.zeros(1, 1, 1, 2, device=device), x.new_empty(2, 1, 1, 1, 1, 1, 4)
    q = place(x, x[0, 0, 0, 0, 0, 0], x[0, 0, 0, 0, 0, 0], row, row, room, 1e-6)[0, 0]
    out, lse = q.transpose(1, 2), x.new_zeros(1, 1, 1)
    join(q, [out] * 4, [lse] * 4, x.new_zeros(4, 1, 4), torch.empty_like(q))
