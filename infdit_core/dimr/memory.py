"""How much memory sampling takes: its own code runs on the meta device, and bytes are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..memory.live_bytes import LiveBytes
from .config import DiMRConfig
from .model import DiMR, parameter_shapes
from .sampling import sample


class _AttentionWithoutScores(TorchFunctionMode):
    """Attention's kernels keep nothing of the size of the scores; the meta device's own does."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=16)
def sampling_bytes(config: DiMRConfig, batch: int, dtype: torch.dtype) -> int:
    """Peak bytes of `sample` with guidance, noise included and weights not.

    Args:
        batch: pictures at once.
        dtype: of the computation.
    """
    evaluation = _evaluation_bytes(config, batch, dtype)
    held = []  # by the sampler, in each of its evaluations

    def network(x: Tensor, *_: Tensor) -> Tensor:
        held.append(live.live)
        return torch.empty_like(x, dtype=torch.float32)

    with LiveBytes() as live:
        side = config.latent_side
        noise = torch.empty(batch, config.channels, side, side, device="meta")
        classes = torch.zeros(batch, dtype=torch.int64, device="meta")
        # three steps: of the highest order, with what the one before left, and the last
        sample(network, noise, classes, evaluations=7, dtype=dtype)
    return max(held) + evaluation


def _evaluation_bytes(config: DiMRConfig, batch: int, dtype: torch.dtype) -> int:
    """Peak bytes of the network alone."""
    model = DiMR(config, dtype=dtype, device="meta").requires_grad_(False)
    side = config.latent_side
    x = torch.empty(batch, config.channels, side, side, dtype=dtype, device="meta")
    classes = torch.zeros(batch, dtype=torch.int64, device="meta")
    with LiveBytes() as live, _AttentionWithoutScores():
        model(x, torch.ones(1, device="meta"), classes)
    return live.peak


@lru_cache(maxsize=16)
def weight_bytes(config: DiMRConfig, dtype: torch.dtype) -> int:
    """Bytes of the network's parameters."""
    return sum(map(math.prod, parameter_shapes(config).values())) * dtype.itemsize
