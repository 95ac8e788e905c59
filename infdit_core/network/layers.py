"""The parts of the network. Tokens are kept block by block: (B, r, c, T, hidden) for r×c blocks."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.grid import Chunk, Frontier
from . import fast
from .attention import Attend, block_attention
from .config import InfDiTConfig
from .rope import Rotary, rotate

EPS = 1e-6
"""Epsilon of every LayerNorm of the network."""


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, with shift and scale (B, hidden) for tokens (B, r, c, T, hidden)."""
    return torch.addcmul(_per_token(shift), x, 1 + _per_token(scale))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm and modulation; of one picture they are one operation."""
    if len(x) == 1 and fast.uses("norm", x):
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], EPS)
    return modulate(layer_norm(x), shift, scale)


def _per_token(x: Tensor) -> Tensor:
    return x[:, None, None, None]


class _Vectors(nn.Embedding):
    """Learned vectors that come from a file, or from the trainer.

    Not drawn here: on the meta device that would import the compiler, for more than a second.
    """

    def reset_parameters(self) -> None:
        pass


def _vectors(count: int, size: int, factory: dict, ops: Any) -> nn.Embedding:
    return (_Vectors if ops is nn else ops.Embedding)(count, size, **factory)


def cast_like(embedding: nn.Embedding, x: Tensor) -> Tensor:
    """All rows of an embedding (n, hidden) by heads, where `x` (..., d) lies and in its dtype.

    Through its forward, because that is where ComfyUI casts weights and adds LoRA to them.
    """
    rows = embedding(torch.arange(embedding.num_embeddings, device=x.device))
    return rows.to(x.dtype).unflatten(-1, (-1, x.shape[-1]))  # (n, A, d)


class MLPEmbedding(nn.Module):
    """Linear, SiLU, Linear: the embedding of the noise level and of the CLIP vector."""

    def __init__(self, features: int, hidden_size: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            ops.Linear(features, hidden_size, **factory),
            nn.SiLU(),
            ops.Linear(hidden_size, hidden_size, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def time_features(c_noise: Tensor, features: int) -> Tensor:
    """(B, features) cosines then sines of the noise level (B,), float32."""
    half = features // 2
    exponents = torch.arange(half, device=c_noise.device, dtype=torch.float32) / half
    angles = c_noise.float()[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class BlockAttention(nn.Module):
    """Self-attention of each block to itself and its left-top, left and top neighbours."""

    def __init__(self, config: InfDiTConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.num_heads = config.num_heads
        self.qkv = ops.Linear(h, 3 * h, **factory)
        self.qk_norm = ops.LayerNorm(d, eps=EPS, **factory)  # for queries and keys alike
        self.segment_embed = _vectors(4, h, factory, ops)
        self.dense = ops.Linear(h, h, **factory)

    def forward(
        self,
        tokens: Tensor,
        shift: Tensor,
        scale: Tensor,
        rotary: Rotary,
        frontier: Frontier,
        chunk: Chunk,
        attend: Attend,
    ) -> Tensor:
        room = frontier.room(tokens.unflatten(-1, (self.num_heads, -1)), chunk)
        q = self.project(tokens, shift, scale, rotary, room)
        lines = 2 if frontier.by_columns(chunk) else 1  # the dimension that counts them
        out = block_attention(
            q.transpose(1, lines),
            frontier.neighbourhoods(chunk),
            cast_like(self.segment_embed, q),
            attend,
        )
        frontier.keep(chunk)
        # linear rounds once more where its input is not contiguous
        return self.dense(out.transpose(1, lines).flatten(-2).contiguous())

    def project(
        self, tokens: Tensor, shift: Tensor, scale: Tensor, rotary: Rotary, room: Tensor
    ) -> Tensor:
        """Queries (B, r, c, T, A, d); keys and values go to `room` (2, B, r, c, T, A, d)."""
        qkv = self.qkv(modulated_norm(tokens, shift, scale))  # (B, r, c, T, 3·hidden)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, r, c, T, 3, A, d)
        norm = self.qk_norm
        if fast.uses("place", qkv) and fast.is_plain(norm, qkv):
            from .kernels import place  # Triton is there where this way is used

            return place(qkv, norm.weight, norm.bias, *rotary, room, EPS)
        q, k, v = qkv.unbind(-3)
        room[0] = rotate(norm(k), rotary)
        room[1] = v
        return rotate(norm(q), rotary).to(q.dtype)


class LRCrossAttention(nn.Module):
    """Attention of each block to the 3×3 blocks of the low-resolution picture around it."""

    def __init__(self, config: InfDiTConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.num_heads, self.lr_block = config.num_heads, config.lr_block
        self.query = ops.Linear(h, h, **factory)
        self.key_value = ops.Linear(h, 2 * h, **factory)
        self.query_norm = ops.LayerNorm(d, eps=EPS, **factory)
        self.key_norm = ops.LayerNorm(d, eps=EPS, **factory)
        self.query_position = _vectors(config.block_tokens, h, factory, ops)
        self.key_position = _vectors(config.lr_window**2, h, factory, ops)
        self.dense = ops.Linear(h, h, **factory)
        self.output_norm = ops.LayerNorm(h, eps=EPS, **factory)  # of the MLP that follows

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Keys and values of LR tokens: (B, y, x, hidden) -> (2, B, y, x, A, d)."""
        # (B, y, x, A, d) each
        k, v = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return torch.stack([self.key_norm(k), v])

    def forward(self, tokens: Tensor, lr_kv: Tensor, attend: Attend) -> Tensor:
        """(B, r, c, T, hidden) -> the same, one row of windows at a time.

        Args:
            lr_kv: keys and values of the LR blocks of this chunk and of one block around it.
        """
        q = self.query_norm(self.query(layer_norm(tokens)).unflatten(-1, (self.num_heads, -1)))
        q = (q + cast_like(self.query_position, q)).transpose(-3, -2)  # (B, r, c, A, T, d)
        key_position = cast_like(self.key_position, q)
        rows = []
        for i in range(tokens.shape[1]):
            k, v = self._windows(lr_kv[:, :, i * self.lr_block :][:, :, : 3 * self.lr_block])
            k = (k + key_position).transpose(1, 2)  # (B·c, A, lr_window², d)
            out = attend(q[:, i].flatten(0, 1), k, v.transpose(1, 2))
            rows.append(rearrange(out, "(b c) a t d -> b c t (a d)", c=tokens.shape[2]))
        return self.dense(torch.stack(rows, dim=1))

    def _windows(self, lr_kv: Tensor) -> Tensor:
        """The 3×3-block windows of a row of LR blocks: (2, B·c, lr_window², A, d)."""
        side = self.lr_block
        windows = lr_kv.unfold(2, 3 * side, side).unfold(3, 3 * side, side)
        return rearrange(windows, "kv b r c a d y x -> kv (b r c) (y x) a d")


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, config: InfDiTConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.fc1 = ops.Linear(config.hidden_size, config.mlp_size, **factory)
        self.fc2 = ops.Linear(config.mlp_size, config.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gelu_of(self.fc1, x))


def _gelu_of(linear: Any, x: Tensor) -> Tensor:
    """gelu(linear(x)), tanh-approximated."""
    if fast.uses("gelu", x) and fast.is_plain(linear, x):
        rows = x.flatten(0, -2)
        weight = linear.weight.t()
        return torch._addmm_activation(linear.bias, rows, weight, use_gelu=True).unflatten(
            0, x.shape[:-1]
        )
    return F.gelu(linear(x), approximate="tanh")


class Layer(nn.Module):
    """One transformer layer: block attention and MLP. `InfDiT` makes the modulations of all."""

    def __init__(self, config: InfDiTConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.attention = BlockAttention(config, factory, ops)
        self.mlp = MLP(config, factory, ops)

    @property
    def fused(self) -> bool:
        """Whether normalisation and rotary are one kernel, and gelu is none of its own."""
        compiled = "project" in vars(self.attention)
        parts = {"place": self.attention.qk_norm, "gelu": self.mlp.fc1}
        return not compiled and all(
            fast.uses(way, part.weight) and fast.is_plain(part, part.weight)
            for way, part in parts.items()
        )

    def compile_parts(self, **options: Any) -> None:
        """Fuse what lies around the attention: norm, modulation, rotary; the MLP."""
        compiled = torch.compile(BlockAttention.project, **options)
        self.attention.project = MethodType(compiled, self.attention)  # so that copies have theirs
        self.mlp.compile(**options)

    def run_eagerly(self) -> None:
        """Undo `compile_parts`."""
        vars(self.attention).pop("project", None)
        self.mlp._compiled_call_impl = None


class FinalLayer(nn.Module):
    """Tokens to pixels: (B, r, c, T, hidden) -> (B, r, c, T, 3·patch²)."""

    def __init__(self, config: InfDiTConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.modulation = ops.Linear(config.hidden_size, 2 * config.hidden_size, **factory)
        self.linear = ops.Linear(config.hidden_size, 3 * config.patch_size**2, **factory)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        # the transformer's own final norm, then this layer's
        return self.linear(modulated_norm(layer_norm(x), shift, scale))
