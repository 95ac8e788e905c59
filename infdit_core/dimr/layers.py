"""The parts of the network. The stream between blocks is float32, as in the authors' autocast.

Linear layers and convolutions work in the dtype of the network's input; norms, whose parameters
depend on time, and attention in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import StageConfig

_LAYER_NORM_EPS, _RMS_EPS = 1e-5, 1e-8


class _Vectors(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: drawing them on the meta device imports the compiler, for more than a second."""


def vectors(count: int, size: int, factory: dict, ops: Any) -> nn.Embedding:
    """Learned vectors (count, size) that come from a file, or from the trainer."""
    return (_Vectors if ops is nn else ops.Embedding)(count, size, **factory)


def all_of(embedding: nn.Embedding, device: torch.device) -> Tensor:
    """All rows (n, size) in float32.

    Through its forward, because that is where ComfyUI casts weights and adds LoRA to them.
    """
    return embedding(torch.arange(embedding.num_embeddings, device=device)).float()


class TimeDependent(nn.Module):
    """A vector that goes from one value to another with time (equation 6 of the paper)."""

    def __init__(self, dim: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.rows = vectors(4, dim, factory, ops)  # at s = 1, at s = -1, weight - 1 and bias

    def forward(self, s: Tensor, like: Tensor) -> Tensor:
        """(B or 1, 1, ..., dim) to be multiplied with `like` (B, ..., dim).

        Args:
            s: (B or 1,) time from -1, no noise, to 1.
        """
        late, early, weight, bias = all_of(self.rows, like.device)
        share = ((weight + 1) * s[:, None] + bias).sigmoid()  # (B or 1, dim)
        value = torch.lerp(early, late, share)
        return value.view(len(s), *(1,) * (like.ndim - 2), -1)


class RMSNorm(nn.Module):
    """x over its root mean square, times a scale that depends on time."""

    def __init__(self, dim: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.scale = TimeDependent(dim, factory, ops)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        rms = x.square().mean(dim=-1, keepdim=True).sqrt()
        return self.scale(s, x) * (x / (rms + _RMS_EPS))


class LayerNorm(nn.Module):
    """LayerNorm whose weight and bias depend on time."""

    def __init__(self, dim: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.weight = TimeDependent(dim, factory, ops)
        self.bias = TimeDependent(dim, factory, ops)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=_LAYER_NORM_EPS)
        return torch.addcmul(self.bias(s, x), self.weight(s, x), normed)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, dim)."""

    def __init__(self, config: StageConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = RMSNorm(config.dim, factory, ops)
        self.qkv = ops.Linear(config.dim, 3 * config.dim, bias=False, **factory)
        self.dense = ops.Linear(config.dim, config.dim, **factory)

    def forward(self, x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        qkv = self.qkv(self.norm(x, s).to(dtype)).float()
        q, k, v = rearrange(qkv, "b n (qkv a d) -> qkv b a n d", qkv=3, a=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.dense(rearrange(out, "b a n d -> b n (a d)").to(dtype))


class DepthwiseConv(nn.Module):
    """A convolution of each channel of a map (B, h, w, dim) by itself."""

    def __init__(self, config: StageConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(
            config.dim,
            config.dim,
            config.kernel,
            padding=config.kernel // 2,
            groups=config.dim,
            **factory,
        )

    def forward(self, x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        return self.conv(x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MLP(nn.Module):
    """Gated: w2(GELU(w0 n) · w1 n) of the norm n."""

    def __init__(self, config: StageConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, factory, ops)
        self.gate = ops.Linear(config.dim, config.hidden_dim, **factory)
        self.value = ops.Linear(config.dim, config.hidden_dim, **factory)
        self.out = ops.Linear(config.hidden_dim, config.dim, **factory)

    def forward(self, x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        normed = self.norm(x, s).to(dtype)
        return self.out(F.gelu(self.gate(normed)) * self.value(normed))


class Block(nn.Module):
    """Attention over tokens or a depthwise convolution over a map, then the MLP."""

    def __init__(self, config: StageConfig, factory: dict, ops: Any) -> None:
        super().__init__()
        mixer = Attention if config.heads else DepthwiseConv
        self.mixer = mixer(config, factory, ops)
        self.mlp = MLP(config, factory, ops)

    def forward(self, x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        x = x + self.mixer(x, s, dtype)
        return x + self.mlp(x, s, dtype)


class Enlarge(nn.Module):
    """The features of a stage to the stem of the next: (B, h, w, dim_in) -> (B, rh, rw, dim)."""

    def __init__(self, dim_in: int, dim: int, ratio: int, factory: dict, ops: Any) -> None:
        super().__init__()
        self.ratio = ratio
        self.norm_in = LayerNorm(dim_in, factory, ops)
        self.linear = ops.Linear(dim_in, dim * ratio**2, **factory)
        self.norm_out = LayerNorm(dim, factory, ops)

    def forward(self, features: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.linear(self.norm_in(features, s).to(dtype)).float()
        # Channels last; pixel_shuffle has them first.
        x = rearrange(x, "b h w (y x c) -> b (h y) (w x) c", y=self.ratio, x=self.ratio)
        return self.norm_out(x, s)
