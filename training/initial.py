"""Weights to start from: small normal ones, and attention that looks nearby.

A pattern of attention is slow to learn: with random positions, the queries of a small network still
spread over most of the low-resolution window after ten thousand steps, and what they fetch is a
blur. So positions start as what they are for, as convolutional starts of vision transformers do
(arXiv 2103.10697, 2305.09828).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from infdit_core.network.layers import Layer
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import Prior

LR_PEAK = 6.0
"""Logit of the row, and of the column, that a query of the cross attention starts to look at."""
LR_WIDTH = 1.0
"""Width of that peak in LR tokens."""
LR_CONTENT = 0.5
"""Weight of what query and key hold besides their places."""
SELF_PAIRS = 2
"""Rotary pairs of each axis that hold a place; the fastest ones, which tell neighbours apart."""
SELF_CONSTANT, SELF_GAIN = 4.0, 1.7
"""Size of these pairs beside others of size 1, and their weight in the norm of queries and keys."""


def initialise(model: InfDiT) -> InfDiT:
    """Small normal weights; modulations and output zero, so that D starts as c_skip · x."""
    depth = 1 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if name.startswith("prior."):
            continue
        if name.startswith("final.") or name.startswith("modulations.") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel() if "embed" in name else parameter.shape[-1]
            std = 0.02 if "segment_embed" in name or "position" in name else fan_in**-0.5
            nn.init.normal_(parameter, std=std)
            if name.endswith(("dense.weight", "fc2.weight")):
                parameter.data.mul_(depth)
    look_at_input(model)
    look_at_neighbours(model)
    if model.prior is not None:
        initialise_prior(model.prior)
    return model


def initialise_prior(prior: Prior) -> None:
    """Small normal kernels, so that no pair adds much; the correction to interpolation is zero."""
    depth = 1 / math.sqrt(2 * len(prior.body))
    for name, parameter in prior.named_parameters():
        if parameter.ndim < 4 or name.startswith("tail."):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            if name.endswith("b.weight"):
                parameter.data.mul_(depth)


@torch.no_grad()
def look_at_input(model: InfDiT) -> None:
    """Let each patch attend to the 2×2 LR tokens around it, one by each of four heads.

    Queries and keys get the sines and cosines of their rows and columns, whose product peaks where
    both are equal.
    """
    config, cross = model.config, model.cross_attention
    count = config.head_dim // 4
    period = max(2 * count, config.lr_window * 4 // 3)  # so that no two places look the same
    rates = torch.arange(1, count + 1) * (2 * math.pi / period)
    weights = torch.exp(-((rates * LR_WIDTH) ** 2) / 2)
    sizes = (LR_PEAK * math.sqrt(config.head_dim) * weights / weights.sum()).sqrt()

    def waves(places: Tensor) -> Tensor:
        angles = places[..., None] * rates
        return torch.cat([angles.cos() * sizes, angles.sin() * sizes], dim=-1)

    def both(rows: Tensor, columns: Tensor) -> Tensor:
        """(r, d/2) and (c, d/2) to (r · c, d)."""
        pairs = rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)
        return torch.cat(pairs, dim=-1).flatten(0, 1)

    cross.query_norm.weight.fill_(LR_CONTENT)
    window = waves(torch.arange(config.lr_window, dtype=torch.float32))
    cross.key_position.weight.copy_(both(window, window).repeat(1, config.num_heads))
    places = (torch.arange(config.block_patches) + 0.5) * config.lr_block / config.block_patches
    places += config.lr_block - 0.5
    by_heads = cross.query_position.weight.unflatten(1, (config.num_heads, -1))
    for head in range(config.num_heads):
        rows, columns = (waves(places + (0.5 if head >> bit & 1 else -0.5)) for bit in (1, 0))
        by_heads[:, head] = both(rows, columns)


@torch.no_grad()
def look_at_neighbours(model: InfDiT) -> None:
    """Let each head attend to one place beside its own: four sides, in the next layer corners."""
    config = model.config
    d, half = config.head_dim, config.head_dim // 2
    pairs = min(SELF_PAIRS, half // 2)
    rates = 10000.0 ** (-torch.arange(pairs) * 2 / half)
    dims = torch.cat([torch.arange(2 * pairs), half + torch.arange(2 * pairs)])
    for number, layer in enumerate(cast("list[Layer]", model.layers)):
        attention = layer.attention
        sides = (0, 1), (1, 0), (0, -1), (-1, 0)
        corners = (1, 1), (1, -1), (-1, 1), (-1, -1)
        weight = attention.qkv.weight.view(3, config.num_heads, d, -1)
        bias = attention.qkv.bias.view(3, config.num_heads, d)
        weight[:2, :, dims] = 0
        for head in range(config.num_heads):
            offset = (corners if number % 2 else sides)[head % 4]
            angles = torch.cat([place * rates for place in offset])
            # alternating signs cancel in the mean, which the norm takes away
            sizes = SELF_CONSTANT * (-1.0) ** torch.arange(len(angles))
            for part, turn in enumerate((angles, torch.zeros_like(angles))):
                waves = torch.stack([turn.cos() * sizes, turn.sin() * sizes], dim=-1)
                bias[part, head, dims] = waves.flatten()
        attention.qk_norm.weight[dims] = SELF_GAIN
