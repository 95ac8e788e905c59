"""Latents to pictures and back while sampling: a VAE in tiles, and the model loaded again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.utils
import torch

log = logging.getLogger(__name__)

CELL = 8
"""Pixels along each side of one latent pixel."""
PLAIN = 1024
"""Side in pixels up to which the authors' VAE works in one piece; beyond, it is that of a tile."""
_SMALLEST = 128
"""Side in pixels of the smallest tile that is tried when memory runs out."""


class Codec:
    """A VAE in use: in one piece up to `tile` px, in overlapping tiles of that side beyond.

    A quarter of a tile overlaps and is blended linearly, as in the authors' code; one pass, where
    ComfyUI's own tiles take three, and without their progress bar. When memory runs out the tiles
    become smaller from then on; torch.OutOfMemoryError if the smallest are still too large.
    """

    def __init__(self, vae: Any, tile: int = PLAIN):
        self.vae = vae
        self.tile = tile

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) in the VAE's scale to (B, 3, 8·h, 8·w) in [0, 1], float32."""
        vae = self.vae

        def decode(tile: torch.Tensor) -> torch.Tensor:
            tile = tile.to(vae.device, vae.vae_dtype)
            return vae.first_stage_model.decode(tile).float()

        picture = self._tiled(latent, decode, vae.memory_used_decode, CELL, 3)
        return vae.process_output(picture)

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), any range, sides in multiples of 8, to (B, 4, H/8, W/8), float32."""
        vae = self.vae

        def encode(tile: torch.Tensor) -> torch.Tensor:
            tile = vae.process_input(tile).to(vae.vae_dtype).to(vae.device)
            return vae.first_stage_model.encode(tile).float()

        channels = vae.latent_channels
        return self._tiled(picture, encode, vae.memory_used_encode, 1 / CELL, channels)

    def _tiled(
        self, x: torch.Tensor, function: Callable, memory_used: Callable, scale: float,
        channels: int,
    ) -> torch.Tensor:  # fmt: skip
        vae, cell = self.vae, CELL if scale > 1 else 1
        longest = max(x.shape[-2:]) * cell
        vae.throw_exception_if_invalid()

        def interruptible(tile: torch.Tensor) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return function(tile)

        while True:
            side = self.tile // cell
            shape = (1, x.shape[1], *(min(n, side) for n in x.shape[-2:]))
            try:
                comfy.model_management.load_models_gpu(
                    [vae.patcher],
                    memory_required=memory_used(shape, vae.vae_dtype),
                    force_full_load=vae.disable_offload,
                )
                with comfy.model_management.cuda_device_context(vae.device):
                    return comfy.utils.tiled_scale(
                        x, interruptible, side, side, side // 4, scale, channels, vae.output_device
                    )
            except Exception as error:
                comfy.model_management.raise_non_oom(error)
                smaller = self.tile // 2
                while smaller >= longest:
                    smaller //= 2
                if smaller < _SMALLEST:
                    raise
            # Outside of `except`, whose traceback holds the tensors that filled the memory.
            self.tile = smaller
            log.warning("DiffuseHigh: out of memory in the VAE; now in tiles of %d px.", smaller)
            comfy.model_management.soft_empty_cache()


def load_again(guider: Any, shape: torch.Size) -> None:
    """Load what `guider` samples with, where a VAE has pushed it out of memory, as before the run.

    shape: (B, C, h, w) of the latent. What is still there stays as it is.
    """
    helpers, patcher = comfy.sampler_helpers, guider.model_patcher
    _, others = helpers.get_additional_models(guider.conds, patcher.model_dtype())
    wanted, least = helpers.estimate_memory(patcher, shape, guider.conds)
    comfy.model_management.load_models_gpu(
        [patcher, *guider.loaded_models],
        memory_required=wanted + others,
        minimum_memory_required=least + others,
    )
