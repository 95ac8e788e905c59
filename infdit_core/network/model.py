"""Inf-DiT, the network and its denoiser D(x; sigma) (arXiv 2405.04312, as the release computes it).

Shapes: B pictures of r×c blocks in a chunk, T tokens a block, A heads of size d, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..bands import row_bands
from ..blocks.grid import Chunk, Frontier, Grid, Strip
from ..blocks.schedules import Full, Schedule
from ..edm import SIGMA_DATA, preconditioning
from ..errors import InfDiTError
from ..precision import exact_convolutions
from .attention import Attend, sdpa
from .condition import Condition
from .config import LR_SCALE, InfDiTConfig
from .layers import (
    FinalLayer,
    Layer,
    LRCrossAttention,
    MLPEmbedding,
    modulate,
    modulated_norm,
    time_features,
)
from .prior import Prior
from .rope import Rotary, rotary_factors
from .run import Run
from .streaming import STREAMED, LayerStream


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
        self.prior = (
            Prior(config.prior_width, config.prior_depth, operations=operations, **factory)
            if config.prior_width
            else None
        )
        self.metadata: dict[str, str] = {}
        """Text that the file of the weights carries."""
        self._stream: LayerStream | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.final.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self.final.linear.weight.dtype

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        schedule: Schedule | None = None,
        *,
        run: Run | None = None,
        dtype: torch.dtype | None = None,
        strip: Strip | None = None,
        c_in: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The raw network F.

        Args:
            x: (B, 3, H, W) the noisy picture times c_in; with a prior, what it adds to the prior's
                picture. With `c_in` the noisy picture itself. It and `cond.concat` may lie on
                another device than sigma: they are copied chunk by chunk.
            sigma: (B,) noise levels, on the device of the computation.
            cond: the condition; `cond.concat` is scaled here.
            schedule: the order of computation; `Full()` if None. The result does not depend on it.
            run: what one evaluation leaves to the next; nothing if None.
            dtype: of the computation; that of x if None.
            strip: of a picture that others compute the rest of; x and `cond.concat` are of the
                strip then, `cond.lr` and `cond.origin` of the whole picture.
            c_in: (B, 1, 1, 1) makes of each chunk of the noisy picture what the network takes.
            out: (B, 3, H, W) where the result is written; made if None.

        Returns:
            (B, 3, H, W) in the dtype and on the device of x, or `out`.

        Raises:
            InfDiTError: a shape does not fit.
        """
        _check(self.config, x, sigma, cond, strip)
        schedule, run = schedule or Full(), run or Run()
        device, dtype = sigma.device, dtype or x.dtype
        if schedule.stream_weights and self._stream is None:
            self.stream_layers(device)
        grid = self.grid(x) if strip is None else strip.own_grid
        concat_scale = self._concat_scale(sigma)
        modulations, final = self.modulate(sigma, cond.vector, dtype)
        rotary = self.rotary(grid, _origin(self.config, cond, strip), device)
        c_in = None if c_in is None else c_in.to(device)
        lr_kv = self._lr_kv_of(cond.lr, concat_scale.to(dtype), run, schedule, grid, strip)
        num_layers = len(self.layers)
        if run.cache is not None:
            blocks = x.shape[0], grid.rows, grid.columns
            tokens_shape = *blocks, self.config.block_tokens, self.config.hidden_size
            num_layers = run.cache.begin(
                float(sigma[0]), tokens_shape, num_layers, schedule.on_host
            )

        cells = schedule.cells(grid, num_layers)
        result = torch.empty_like(x) if out is None else out
        with (
            schedule.tokens(device, cells, run.host) as waiting,
            schedule.lines(device, grid, cells, run.host) as lines,
        ):
            link = None if strip is None else strip.link
            frontiers = [Frontier(grid, lines, n, link) for n in range(num_layers)]
            for done, (n, chunk) in enumerate(cells, 1):
                if n == 0:
                    tokens = self.embed(x, cond.concat, concat_scale, chunk, dtype, c_in)
                else:
                    tokens = waiting.pop(chunk)
                # (B, r, c, T, hidden) all the way
                tokens = self.layer(
                    n, tokens, modulations[n], rotary.of(chunk), frontiers[n], chunk, lr_kv
                )
                if run.cache is not None:
                    tokens = run.cache.after(n, tokens, chunk)
                if n + 1 < num_layers:
                    waiting[chunk] = tokens
                else:
                    rows, columns = chunk.scaled(self.config.block_px)
                    result[..., rows, columns] = self.pixels(tokens, final)
                del tokens  # it would live into the next turn
                if run.progress is not None:
                    run.progress(done, len(cells))
        return result

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Condition,
        schedule: Schedule | None = None,
        *,
        run: Run | None = None,
        strip: Strip | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma), the denoised picture: (B, 3, H, W) for x (B, 3, H, W) and sigma (B,) or one.

        With a prior, `cond.concat` is its picture P, and what is denoised is what x adds to it:
        D(x) = P + c_skip · (x - P) + c_out · F(c_in · (x - P)). The network runs in its own dtype,
        preconditioning in that of x, chunk by chunk and band by band.

        Args:
            out: (B, 3, H, W) where D is written, like x; made if None.
        """
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        factors = preconditioning(sigmas, self.config.sigma_data)
        c_skip, c_out, c_in, _ = (c[:, None, None, None] for c in factors)
        if out is None:
            out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, sigmas.dtype))
        self(
            x,
            sigmas.to(self.device),
            cond,
            schedule,
            run=run,
            dtype=self.dtype,
            strip=strip,
            c_in=c_in,
            out=out,
        )
        for rows in row_bands(x.shape[-2], x[..., 0, :].numel()):
            raw, seen = out[..., rows, :], x[..., rows, :]
            if self.prior is None:
                out[..., rows, :] = c_out * raw + c_skip * seen
            else:
                base = cond.concat[..., rows, :].to(x)
                out[..., rows, :] = base + (c_out * raw + c_skip * (seen - base))
        return out

    def _concat_scale(self, sigma: Tensor) -> Tensor:
        """(B, 1, 1, 1) what `cond.concat` is multiplied by beside a picture times c_in.

        A prior's picture has the size of a picture whatever the noise is: c_in of what is diffused
        would make it ten times as large.
        """
        if self.prior is None:
            return preconditioning(sigma.float()).c_in[:, None, None, None]
        return torch.full_like(sigma.float(), 1 / SIGMA_DATA)[:, None, None, None]

    def grid(self, x: Tensor) -> Grid:
        """The block grid of a picture (..., H, W) in pixels.

        Raises:
            InfDiTError: a side is not a positive multiple of the block side.
        """
        side = self.config.block_px
        height, width = x.shape[-2:]
        if height < 1 or width < 1 or height % side or width % side:
            raise InfDiTError(
                f"expected sides that are multiples of {side} px, got {width}×{height}"
            )
        return Grid(height // side, width // side)

    def modulate(
        self, sigma: Tensor, vector: Tensor | None, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Shifts and scales: (B, 4, hidden) for each layer, and the last two (B, hidden).

        Args:
            sigma: (B,) noise levels, on the device of the computation.
            vector: (B, vector_size) CLIP embedding.
        """
        c_noise = preconditioning(sigma.float()).c_noise
        features = time_features(c_noise, self.config.time_features)
        embed = self.time_embed(features.to(dtype))  # (B, hidden)
        if self.vector_embed is not None and vector is not None:
            embed = embed + self.vector_embed(vector.to(embed))
        embed = F.silu(F.silu(embed))  # the release applies it once to e, once in each modulation
        # like streamed layers, these weights stay in RAM
        at_weights = embed if self._stream is None else embed.cpu()
        modulations = self.modulations(at_weights).to(embed.device)  # (B, L·4·hidden)
        modulations = modulations.unflatten(-1, (len(self.layers), 4, -1)).unbind(1)
        return modulations, self.final.modulation(embed).chunk(2, dim=-1)

    def rotary(self, grid: Grid, origin: tuple[int, int], device: torch.device) -> Rotary:
        """Rotary factors of all patch rows and columns of a picture that begins at `origin`."""
        side, head_dim = self.config.block_patches, self.config.head_dim

        def factors(blocks: int, start: int) -> Tensor:
            positions = start + torch.arange(blocks * side, device=device)
            if self.config.rope_wrap:
                positions = positions % self.config.rope_wrap
            return rotary_factors(positions, head_dim).unflatten(0, (blocks, side))

        return Rotary(factors(grid.rows, origin[0]), factors(grid.columns, origin[1]))

    def embed(
        self,
        x: Tensor,
        concat: Tensor,
        concat_scale: Tensor,
        chunk: Chunk,
        dtype: torch.dtype,
        c_in: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, r, c, T, hidden) of a chunk; x, concat (B, 3, H, W), factors (B, 1, 1, 1)."""
        rows, columns = chunk.scaled(self.config.block_px)
        x, c = (p[..., rows, columns].to(concat_scale.device) for p in (x, concat))
        if c_in is not None:
            x = (x if self.prior is None else x - c.to(x)) * c_in
        with exact_convolutions(dtype):
            tokens = self.patch_embed(torch.cat([x, c * concat_scale], dim=1).to(dtype))
        # (B, hidden, patch rows, patch columns)
        return rearrange(
            tokens, "b h (r y) (c x) -> b r c (y x) h", r=chunk.rows, c=chunk.columns
        ).contiguous()

    def layer(
        self,
        n: int,
        tokens: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        frontier: Frontier,
        chunk: Chunk,
        lr_kv: Callable[[Chunk], Tensor],
    ) -> Tensor:
        """Layer n: (B, r, c, T, hidden) -> the same. Only the first looks at the LR picture."""
        layer = cast("Layer", self.layers[n] if self._stream is None else self._stream[n])
        attn_shift, attn_scale, mlp_shift, mlp_scale = modulation.unbind(1)  # (B, hidden) each
        tokens = tokens + layer.attention(
            tokens, attn_shift, attn_scale, rotary, frontier, chunk, self.attend
        )
        if n == 0:
            tokens = tokens + self.cross_attention(tokens, lr_kv(chunk), self.attend)
            mlp_in = modulate(self.cross_attention.output_norm(tokens), mlp_shift, mlp_scale)
        else:
            mlp_in = modulated_norm(tokens, mlp_shift, mlp_scale)
        return tokens + layer.mlp(mlp_in)

    def pixels(self, tokens: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Tokens (B, r, c, T, hidden) to pixels (B, 3, r·block, c·block)."""
        return rearrange(
            self.final(tokens, *modulation),
            "b r c (y x) (p q ch) -> b ch (r y p) (c x q)",
            y=self.config.block_patches,
            p=self.config.patch_size,
            ch=3,
        )

    def lr_keys_values(
        self,
        lr: Tensor,
        chunk: Chunk | None = None,
        pieces: Iterable[Chunk] | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Keys and values of the LR picture: they depend on nothing else, so make them once.

        Outside the picture tokens are zero, so keys and values there are those of the biases.

        Args:
            lr: (B, 3, H/4, W/4), on any device.
            chunk: only what the blocks of this chunk see; everything if None.
            pieces: chunks that they are made in, which cover the picture; all at once if None.
            like: a tensor in the dtype and on the device of the computation; lr if None.

        Returns:
            (2, B, y, x, A, d): the LR tokens of these blocks and of one block around them.
        """
        side = self.config.lr_block
        px = self.config.block_px // LR_SCALE
        grid = Grid(lr.shape[-2] // px, lr.shape[-1] // px)
        halo = (chunk or grid.whole).grown(1)
        like = lr if like is None else like
        zeros = like.new_zeros(1, 1, 1, self.config.hidden_size)
        outside = self.cross_attention.keys_values(zeros)
        # (2, 1, 1, 1, A, d)
        area = len(lr), halo.rows * side, halo.columns * side
        made = outside.expand(2, *area, *outside.shape[-2:]).contiguous()
        for piece in pieces or [halo.within(grid.whole)]:
            rows, columns = piece.scaled(px)
            seen = lr[..., rows, columns].to(like)
            with exact_convolutions(seen.dtype):
                tokens = rearrange(self.lr_embed(seen), "b h y x -> b y x h")
            rows, columns = piece.seen_from(halo).scaled(side)
            made[:, :, rows, columns] = self.cross_attention.keys_values(tokens.contiguous())
            del tokens  # it would live into the next turn
        return made

    def _lr_kv_of(
        self,
        lr: Tensor,
        like: Tensor,
        run: Run,
        schedule: Schedule,
        grid: Grid,
        strip: Strip | None,
    ) -> Callable[[Chunk], Tensor]:
        """What gives the LR keys and values that the blocks of a chunk see.

        Args:
            like: in the dtype and on the device of the computation, which lr comes to in pieces.
        """
        place = grid.whole if strip is None else strip.chunk
        if not schedule.keep_lr:
            run.lr_kv = None
            return lambda chunk: self.lr_keys_values(
                lr, chunk.moved(place.top, place.left), like=like
            )
        if run.lr_kv is None or run.lr_kv.shape[1] != len(lr):
            run.lr_kv = None  # lets it go before the next ones come
            pieces = [chunk.moved(place.top, place.left) for chunk in schedule.chunks(grid)]
            if strip is not None:  # and what it sees of its neighbours
                pieces += strip.beside()
            run.lr_kv = self.lr_keys_values(lr, place, pieces, like=like)
        kept, halo, side = run.lr_kv, grid.whole.grown(1), self.config.lr_block

        def around(chunk: Chunk) -> Tensor:
            rows, columns = chunk.grown(1).seen_from(halo).scaled(side)
            return kept[:, :, rows, columns]

        return around

    def stream_layers(self, device: torch.device | str) -> None:
        """Compute on `device` with the layers left in RAM, copied there one at a time.

        For networks whose weights do not fit; use with `LayerMajor`, which needs each layer once
        per evaluation.
        """
        for name, part in self.named_children():
            part.to("cpu" if name in STREAMED else device)
        self._stream = LayerStream(self.layers, device)

    def compile_layers(self, **options: Any) -> None:
        """Compile the parts of each layer around its attention; the result stays the same.

        All layers share one compiled graph, for chunks of any size. Takes the first evaluation
        about a minute longer.

        Args:
            options: of `torch.compile`.
        """
        for layer in cast("list[Layer]", self.layers):
            layer.compile_parts(dynamic=True, **options)

    @property
    def fused(self) -> bool:
        """Whether the ways of a GPU that take less memory (`fast`) compute all layers as they are.

        Not where ComfyUI casts weights at use, nor with compiled layers.
        """
        return all(layer.fused for layer in cast("list[Layer]", self.layers))

    def run_eagerly(self) -> None:
        """Undo `compile_layers`."""
        for layer in cast("list[Layer]", self.layers):
            layer.run_eagerly()


def _origin(config: InfDiTConfig, cond: Condition, strip: Strip | None) -> tuple[int, int]:
    """Row and column in patches of the top left corner of x."""
    if strip is None:
        return cond.origin
    side, (row, column) = config.block_patches, cond.origin
    return row + side * strip.chunk.top, column + side * strip.chunk.left


def _check(
    config: InfDiTConfig, x: Tensor, sigma: Tensor, cond: Condition, strip: Strip | None
) -> None:
    batch, _, height, width = x.shape
    whole = height, width
    if strip is not None:
        height, width = (config.block_px * n for n in (strip.chunk.rows, strip.chunk.columns))
        whole = config.block_px * strip.grid.rows, config.block_px * strip.grid.columns
    expected = {
        "x": (x, (batch, 3, height, width)),
        "sigma": (sigma, (batch,)),
        "concat": (cond.concat, (batch, 3, height, width)),
        "lr": (cond.lr, (batch, 3, *(side // LR_SCALE for side in whole))),
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
