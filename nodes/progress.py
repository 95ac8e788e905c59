"""What the user sees while sampling: progress per chunk of blocks, a preview per step."""

from __future__ import annotations

import comfy.utils
import torch
from PIL import Image
from torch.nn import functional as F

_PREVIEW_MAX_PX = 512


class SamplingProgress:
    """One progress bar over all evaluations of a node's run.

    Args:
        evaluations: of the network, over all steps, passes and pictures.
    """

    def __init__(self, evaluations: int) -> None:
        self._evaluations = evaluations
        self._finished = 0
        self._bar = comfy.utils.ProgressBar(evaluations)

    def cells(self, done: int, total: int) -> None:
        """Called after every chunk of every layer of an evaluation."""
        self._bar.update_absolute(self._finished * total + done, self._evaluations * total)
        if done == total:
            self._finished += 1

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """The sampler's callback: shows the denoised picture."""
        preview = ("JPEG", preview_image(denoised), _PREVIEW_MAX_PX)
        self._bar.update_absolute(self._bar.current, None, preview)


def preview_image(denoised: torch.Tensor) -> Image.Image:
    """The first picture of (B, 3, H, W) in [-1, 1], at most 512 px wide and high."""
    picture = denoised[:1].float()
    factor = _PREVIEW_MAX_PX / max(picture.shape[-2:])
    if factor < 1:
        picture = F.interpolate(picture, scale_factor=factor, mode="area")
    levels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
