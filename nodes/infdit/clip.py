"""A CLIP tower under ComfyUI's memory management."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import torch

from ...infdit_core.clip import ClipGuide
from ...infdit_core.pictures.alpha import fill_invisible


class PatchedClip:
    """A `ClipGuide` whose weights ComfyUI moves to the device when they are used."""

    def __init__(self, state_dict: dict[str, torch.Tensor]) -> None:
        device = comfy.model_management.text_encoder_device()
        offload_device = comfy.model_management.text_encoder_offload_device()
        on_cpu = comfy.model_management.is_device_cpu(device)
        dtype = torch.float32 if on_cpu else comfy.model_management.text_encoder_dtype(device)
        self.guide = ClipGuide.from_state_dict(state_dict, device=offload_device, dtype=dtype)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.guide.model, load_device=device, offload_device=offload_device
        )

    @torch.no_grad()
    def vector(
        self, image: torch.Tensor, positive: str = "", negative: str = "", text_strength: float = 0
    ) -> torch.Tensor:
        """(B, vector_size) float32 embeddings on the CPU; see `ClipGuide.guide`."""
        # in whole or not at all: open_clip's layers are not ComfyUI's, which cast what is elsewhere
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        # resized on the CPU, because not every device can; then it follows the weights
        seen = fill_invisible(image.cpu())
        return self.guide.guide(seen, positive, negative, text_strength).float().cpu()
