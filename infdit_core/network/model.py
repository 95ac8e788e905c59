"""Inf-DiT, the network and its denoiser D(x; sigma) (arXiv 2405.04312, as the release computes it).

`InfDiT` owns the weights; `Evaluation` is one pass of them over one picture, cut into chunks of
blocks, which a schedule puts in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.grid import Chunk, Frontier, Grid
from ..blocks.schedules import Full, Schedule
from ..edm import preconditioning
from ..errors import InfDiTError
from .attention import Attend, sdpa
from .condition import Condition
from .config import LR_SCALE, InfDiTConfig
from .layers import (
    FinalLayer,
    Layer,
    LRCrossAttention,
    MLPEmbedding,
    Rotary,
    normalize,
    time_features,
)
from .residual_cache import ResidualCache
from .rope import rotary_factors
from .streaming import LayerStream

Progress = Callable[[int, int], None]
"""Called after every chunk of every layer with (cells done, cells in all); may raise to cancel."""


class InfDiT(nn.Module):
    """The diffusion transformer, in the dtype of its input.

    Args:
        config: the hyper-parameters.
        dtype, device: of the parameters.
        operations: where the layer classes come from: `torch.nn`, or one of ComfyUI's `comfy.ops`.
        attend: the attention function.
    """

    def __init__(
        self,
        config: InfDiTConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        attend: Attend = sdpa,
    ) -> None:
        super().__init__()
        self.config = config
        self.attend = attend
        h, p = config.hidden_size, config.patch_size
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.patch_embed = operations.Conv2d(6, h, p, stride=p, **factory)
        self.time_embed = MLPEmbedding(config.time_features, h, factory, operations)
        self.vector_embed = (
            MLPEmbedding(config.vector_size, h, factory, operations) if config.vector_size else None
        )
        self.lr_embed = operations.Conv2d(3, h, 2, stride=2, **factory)
        self.cross_attention = LRCrossAttention(config, factory, operations)
        self.modulations = operations.Linear(h, config.num_layers * 4 * h, **factory)
        self.layers = nn.ModuleList(
            Layer(config, factory, operations) for _ in range(config.num_layers)
        )
        self.final = FinalLayer(config, factory, operations)
        self._stream: LayerStream | None = None

    def stream_layers(self, device: torch.device | str) -> None:
        """Compute on `device` with the layers left in main memory, copied there one at a time.

        For networks whose weights do not fit; use with `LayerMajor`, which needs each layer once
        per evaluation.
        """
        self._stream = LayerStream(self, device)

    def compile_layers(self, **options: Any) -> None:
        """Compile the parts of each layer around its attention; the result stays the same.

        All layers share one compiled graph, for chunks of any size. Takes the first evaluation
        about a minute longer.

        Args:
            options: of `torch.compile`.
        """
        for layer in cast("list[Layer]", self.layers):
            layer.compile_parts(dynamic=True, **options)

    def grid(self, x: Tensor) -> Grid:
        """The block grid of a picture (..., H, W) in pixels.

        Raises:
            InfDiTError: a side is not a positive multiple of the block side.
        """
        side = self.config.block_px
        height, width = x.shape[-2:]
        if height < 1 or width < 1 or height % side or width % side:
            raise InfDiTError(
                f"expected sides that are multiples of {side} px, got {height}×{width}"
            )
        return Grid(height // side, width // side)

    def lr_keys_values(self, lr: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Keys and values of the LR picture: they depend on nothing else, so make them once.

        Outside the picture tokens are zero, so keys and values there are those of the biases.

        Args:
            lr: (B, 3, H/4, W/4) in the dtype of the computation.
            chunk: only what the blocks of this chunk see; everything if None.

        Returns:
            (2, B, y, x, A, d): the LR tokens of these blocks and of one block around them.
        """
        side = self.config.lr_block
        px = self.config.block_px // LR_SCALE
        if chunk is None:
            chunk = Grid(lr.shape[-2] // px, lr.shape[-1] // px).whole
        halo = Chunk(chunk.top - 1, chunk.bottom + 1, chunk.left - 1, chunk.right + 1)
        inside = Chunk(*(max(0, n) for n in halo))
        rows, columns = inside.scaled(px)
        tokens = rearrange(self.lr_embed(lr[..., rows, columns]), "b h y x -> b y x h")
        before = (inside.top - halo.top) * side, (inside.left - halo.left) * side
        missing = (
            halo.rows * side - before[0] - tokens.shape[1],
            halo.columns * side - before[1] - tokens.shape[2],
        )
        tokens = F.pad(tokens, (0, 0, before[1], missing[1], before[0], missing[0]))
        return self.cross_attention.keys_values(tokens)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        schedule: Schedule | None = None,
        *,
        lr_kv: Tensor | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        cache: ResidualCache | None = None,
    ) -> Tensor:
        """The raw network F.

        Args:
            x: (B, 3, H, W) the noisy picture times c_in.
            sigma: (B,) noise levels.
            cond: the condition; `cond.concat` is multiplied by c_in here.
            schedule: the order of computation; `Full()` if None. The result does not depend on it.
            lr_kv: `lr_keys_values(cond.lr)`, if kept; made for every chunk anew if None.
            dtype: of the computation; that of x if None.
            progress: called after every chunk of every layer.
            cache: of the sampling run, to leave out layers where sigma has hardly changed.

        Returns:
            (B, 3, H, W) in the dtype of x.

        Raises:
            InfDiTError: a shape does not fit.
        """
        evaluation = Evaluation(self, x, sigma, cond, lr_kv, dtype or x.dtype, progress, cache)
        evaluation.run(schedule or Full())
        return evaluation.result

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Condition,
        schedule: Schedule | None = None,
        *,
        lr_kv: Tensor | None = None,
        progress: Progress | None = None,
        cache: ResidualCache | None = None,
    ) -> Tensor:
        """D(x; sigma), the denoised picture: (B, 3, H, W) for x (B, 3, H, W) and sigma (B,) or one.

        The network runs in the dtype of its parameters, preconditioning in that of x.
        """
        weight = self.final.linear.weight
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        c_skip, c_out, c_in, _ = (c[:, None, None, None] for c in preconditioning(sigmas))
        raw = self(
            x * c_in,
            sigmas.to(weight.device),
            cond,
            schedule,
            lr_kv=lr_kv,
            dtype=weight.dtype,
            progress=progress,
            cache=cache,
        )
        return c_out * raw + c_skip * x


class Evaluation:
    """One evaluation of the network over one picture: what its cells share, and the cells."""

    def __init__(
        self,
        net: InfDiT,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        lr_kv: Tensor | None,
        dtype: torch.dtype,
        progress: Progress | None = None,
        cache: ResidualCache | None = None,
    ) -> None:
        _check(net.config, x, sigma, cond)
        self.grid = net.grid(x)
        self.num_layers = layers = net.config.num_layers
        self._cache = cache
        if cache is not None:
            tokens = x.shape[0], net.config.block_tokens, net.config.hidden_size
            self.num_layers = cache.begin(float(sigma[0]), self.grid, tokens, layers)
        self._reusing = self.num_layers < layers
        self.device = sigma.device  # pictures may wait elsewhere, and come chunk by chunk
        self.result = torch.empty_like(x)
        self._net, self._config = net, net.config
        self._layers = cast("list[Layer]", net.layers)
        self._x, self._concat, self._dtype = x, cond.concat, dtype
        factors = preconditioning(sigma.float())
        self._c_in = factors.c_in[:, None, None, None]
        self._lr_kv = lr_kv
        self._lr = cond.lr.to(self.device, dtype) if lr_kv is None else cond.lr
        self._rotary = Rotary(
            *(
                self._factors(count, start)
                for count, start in zip(self.grid, cond.origin, strict=True)
            )
        )
        embed = net.time_embed(time_features(factors.c_noise, self._config.time_features).to(dtype))
        if net.vector_embed is not None and cond.vector is not None:
            embed = embed + net.vector_embed(cond.vector.to(self.device, dtype))
        embed = F.silu(F.silu(embed))  # the release applies it once to e, once in each modulation
        # like streamed layers, these weights stay in main memory
        at_weights = embed if net._stream is None else embed.cpu()
        modulations = net.modulations(at_weights).to(self.device)
        self._modulations = modulations.unflatten(-1, (layers, 4, -1)).unbind(1)
        self._final_modulation = net.final.modulation(embed).chunk(2, dim=-1)
        self._progress, self._done, self._total = progress, 0, 0

    def run(self, schedule: Schedule) -> None:
        """Fill `result` in the order of a schedule. Calling again begins again."""
        self._done, self._total = 0, schedule.cells(self.grid, self.num_layers)
        if self._cache is not None:
            self._cache.on_host = schedule.tokens_on_host
        schedule.run(self)

    def stream_weights(self) -> None:
        if self._net._stream is None:
            self._net.stream_layers(self.device)

    def embed(self, chunk: Chunk) -> Tensor:
        rows, columns = chunk.scaled(self._config.block_px)
        x = self._x[..., rows, columns].to(self.device)
        c = self._concat[..., rows, columns].to(self.device)
        tokens = self._net.patch_embed(torch.cat([x, c * self._c_in], dim=1).to(self._dtype))
        return rearrange(
            tokens, "b h (r y) (c x) -> b r c (y x) h", r=chunk.rows, c=chunk.columns
        ).contiguous()

    def layer(self, n: int, tokens: Tensor, chunk: Chunk, frontier: Frontier) -> Tensor:
        net = self._net
        layer = self._layers[n] if net._stream is None else net._stream[n]
        attn_shift, attn_scale, mlp_shift, mlp_scale = self._modulations[n].unbind(1)
        rotary = self._rotary.of(chunk, self._config.block_patches)

        tokens = tokens + layer.attention(
            tokens, attn_shift, attn_scale, rotary, frontier, chunk, net.attend
        )
        if n == 0:
            cross = net.cross_attention
            tokens = tokens + cross(tokens, self._lr_kv_of(chunk), net.attend)
            mlp_in = cross.output_norm(tokens)
        else:
            mlp_in = normalize(tokens)
        tokens = tokens + layer.mlp(mlp_in, mlp_shift, mlp_scale)

        if self._cache and not self._reusing and n + 1 == self.num_layers - self._cache.layers:
            self._cache.enter(tokens, chunk)
        if self._progress is not None:
            self._done += 1
            self._progress(self._done, self._total)
        return tokens

    def write(self, tokens: Tensor, chunk: Chunk) -> None:
        if self._cache and self._reusing:
            tokens = self._cache.add(tokens, chunk)
        elif self._cache:
            self._cache.leave(tokens, chunk)
        rows, columns = chunk.scaled(self._config.block_px)
        self.result[..., rows, columns] = rearrange(
            self._net.final(tokens, *self._final_modulation),
            "b r c (y x) (p q ch) -> b ch (r y p) (c x q)",
            y=self._config.block_patches,
            p=self._config.patch_size,
            ch=3,
        )

    def _lr_kv_of(self, chunk: Chunk) -> Tensor:
        """Keys and values of the LR blocks of a chunk and of one block around it."""
        if self._lr_kv is None:
            return self._net.lr_keys_values(self._lr, chunk)
        halo = Chunk(chunk.top, chunk.bottom + 2, chunk.left, chunk.right + 2)
        rows, columns = halo.scaled(self._config.lr_block)
        return self._lr_kv[:, :, rows, columns]

    def _factors(self, blocks: int, start: int) -> Tensor:
        positions = start + torch.arange(blocks * self._config.block_patches, device=self.device)
        if self._config.rope_wrap:
            positions = positions % self._config.rope_wrap
        return rotary_factors(positions, self._config.head_dim)


def _check(config: InfDiTConfig, x: Tensor, sigma: Tensor, cond: Condition) -> None:
    batch, _, height, width = x.shape
    expected = {
        "x": (x, (batch, 3, height, width)),
        "sigma": (sigma, (batch,)),
        "concat": (cond.concat, (batch, 3, height, width)),
        "lr": (cond.lr, (batch, 3, height // LR_SCALE, width // LR_SCALE)),
    }
    if config.vector_size:
        if cond.vector is None:
            raise InfDiTError(
                f"this model needs a CLIP embedding: expected vector {(batch, config.vector_size)},"
                " got none"
            )
        expected["vector"] = (cond.vector, (batch, config.vector_size))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise InfDiTError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
