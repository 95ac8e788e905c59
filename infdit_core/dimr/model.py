"""The network: stages from coarse to fine, each given the features of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..precision import exact_convolutions
from .config import DiMRConfig, StageConfig
from .layers import Block, Enlarge, LayerNorm, all_of, vectors


class Stage(nn.Module):
    """A U-ViT at one resolution: half of the blocks keep a skip, the other half take them back."""

    def __init__(
        self, model: DiMRConfig, config: StageConfig, before: StageConfig | None, factory: dict,
        ops: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        half = config.blocks // 2
        self.stem = ops.Conv2d(
            model.channels, config.dim, config.stem, stride=config.stem, **factory
        )
        self.position = vectors(config.side**2, config.dim, factory, ops)
        self.class_embed = self.enlarge = None
        if config.heads:
            self.class_embed = vectors(model.embeddings, config.dim, factory, ops)
        if before is not None:
            ratio = config.side // before.side
            self.enlarge = Enlarge(before.features, config.dim, ratio, factory, ops)
        self.blocks = nn.ModuleList(Block(config, factory, ops) for _ in range(config.blocks))
        self.skips = nn.ModuleList(
            ops.Linear(2 * config.dim, config.dim, **factory) for _ in range(half)
        )
        self.norm = LayerNorm(config.dim, factory, ops)
        self.final = ops.Conv2d(
            config.dim,
            model.channels,
            config.final_kernel,
            padding=config.final_kernel // 2,
            **factory,
        )

    def forward(
        self, latent: Tensor, s: Tensor, classes: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stage's eps (B, channels, side, side) and features (B, side, side, n).

        Args:
            latent: (B, channels, H, W), whole at every stage.
            s: (B or 1,) time in [-1, 1].
            classes: (B,) integers.
            features: of the stage before, (B, h, w, n).
        """
        dtype, side = latent.dtype, self.config.side
        x = self.stem(latent).permute(0, 2, 3, 1).float()  # (B, side, side, dim)
        x = x + all_of(self.position, x.device).view(side, side, -1)
        if self.enlarge is not None and features is not None:
            x = x + self.enlarge(features, s, dtype)
        if self.class_embed is not None:
            token = self.class_embed(classes).float()[:, None]  # (B, 1, dim)
            x = torch.cat([token, rearrange(x, "b h w c -> b (h w) c")], dim=1)

        outputs, waiting = [x], []
        for n, block in enumerate(self.blocks):
            back = n - len(self.blocks) // 2 - 1  # of the second half, from 0
            if back >= 0:
                joined = torch.cat([x, waiting.pop()], dim=-1)
                x = self.skips[back](joined.to(dtype)).float()
            x = block(x, s, dtype)
            if n < len(self.skips):
                waiting.append(x)
            outputs.append(x)

        if self.class_embed is not None:
            outputs = [tokens[:, 1:].unflatten(1, (side, side)) for tokens in outputs]
        normed = self.norm(outputs[-1], s).to(dtype)  # (B, side, side, dim)
        return self.final(normed.permute(0, 3, 1, 2)).float(), torch.cat(outputs, dim=-1)


class DiMR(nn.Module):
    """Predicts the noise in a latent of a class (DiMR, arXiv 2406.09416).

    Args:
        config: hyper-parameters.
        dtype, device: of the weights, which are not initialised.
        ops: module with Linear, Conv2d and Embedding, such as ComfyUI's operations.
    """

    def __init__(
        self,
        config: DiMRConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        ops: Any = nn,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        before = [None, *config.stages]
        self.stages = nn.ModuleList(
            Stage(config, stage, coarser, factory, ops)
            for stage, coarser in zip(config.stages, before, strict=False)
        )

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """eps (B, channels, H, W), float32; see `outputs`."""
        return self.outputs(x, t, classes)[-1]

    def outputs(self, x: Tensor, t: Tensor, classes: Tensor) -> list[Tensor]:
        """The eps of every stage, from coarse to fine; training has a loss for each.

        Args:
            x: (B, channels, H, W) noisy latents of variance about 1, H = W = `latent_side`;
                linear layers work in its dtype.
            t: (B or 1,) time in (0, 1], 1 at the most noise.
            classes: (B,) integers, `NULL_CLASS` for none.
        """
        s = 2 * t.float() - 1  # the authors' (8 t - 4) / 4
        if len(s) > 1 and (s == s[0]).all():
            s = s[:1]
        eps, features = [], None
        with exact_convolutions(x.dtype):
            for stage in self.stages:
                out, features = stage(x, s, classes, features)
                eps.append(out)
        return eps


@lru_cache(maxsize=8)
def parameter_shapes(config: DiMRConfig) -> Mapping[str, tuple[int, ...]]:
    """Every parameter of `DiMR(config)` with its shape."""
    state = DiMR(config, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
