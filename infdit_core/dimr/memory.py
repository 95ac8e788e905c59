"""Memory of sampling, measured on the meta device."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..memory.live_bytes import LiveBytes
from .config import DiMRConfig
from .model import DiMR


@lru_cache(maxsize=64)
def sampling_bytes(config: DiMRConfig, batch: int, dtype: torch.dtype) -> int:
    """Peak bytes of live tensors in an evaluation of `batch` pictures, beside the weights.

    Args:
        dtype: of the computation.
    """
    model = DiMR(config, dtype=dtype, device="meta").requires_grad_(False)
    side = config.latent_side
    x = torch.empty(batch, config.channels, side, side, dtype=dtype, device="meta")
    classes = torch.empty(batch, dtype=torch.int64, device="meta")
    features, s = None, torch.empty(1, device="meta")
    with torch.inference_mode(), LiveBytes() as counted:
        for stage in model.stages:
            _, features = stage(x, s, classes, features)
    latents = 4 * x.numel() * torch.float32.itemsize  # x, the denoised ones and the solver's
    return counted.peak + latents
