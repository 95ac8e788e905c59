"""Which part of a picture is upscaled, and which keeps what sampling starts from.

The meaning is that of ComfyUI's denoise mask: white is drawn, black keeps the picture that sampling
starts from, grey mixes the two in every step.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..network.config import LR_SCALE
from .prepare import Canvas, PreparationError
from .start import same_shape

logger = logging.getLogger(__name__)


def check_mask(mask: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """A mask as (1 or batch, h, w) in 0..1.

    Args:
        mask: ([1 or batch,] h, w), of any size in the shape of the result.
        batch: the number of pictures that are upscaled.
        size: (height, width) of the result.

    Raises:
        PreparationError: no mask, too few or too many, or of another shape. One value everywhere
            goes with any shape.
    """
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or min(mask.shape) < 1 or not mask.is_floating_point():
        raise PreparationError(
            f"expected a mask of shape (batch, height, width) in 0..1; got {tuple(mask.shape)}"
            f" {mask.dtype}"
        )
    if not mask.isfinite().all():
        raise PreparationError("expected a mask in 0..1; got NaN or infinity in it")
    if len(mask) not in (1, batch):
        expected = f"1 or {batch} masks" if batch > 1 else "1 mask"
        raise PreparationError(f"expected {expected}; got {len(mask)}")
    mask = mask.float().clamp(0, 1)
    if mask.min() == mask.max():
        if not mask.any():
            logger.warning("Inf-DiT: the mask is black everywhere, so that nothing is upscaled")
    elif not same_shape((mask.shape[1], mask.shape[2]), size):
        raise PreparationError(
            f"expected a mask in the shape of the result, {size[1]}×{size[0]} px, of any size;"
            f" got {mask.shape[2]}×{mask.shape[1]} px"
        )
    return mask


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A (B, h, w) at the (height, width) of `size`: (B, 1, height, width)."""
    return F.interpolate(mask[:, None], size=size, mode="bilinear", antialias=True).clamp(0, 1)


def lay_mask(mask: Tensor, canvas: Canvas) -> Tensor:
    """A checked (B, h, w) as the canvas has it: (B, 1, H, W); its edge goes on over the padding."""
    height, width = canvas.concat.shape[-2:]
    mask = resize_mask(mask, (canvas.height, canvas.width))
    left, top = canvas.left, canvas.top
    right, bottom = width - left - canvas.width, height - top - canvas.height
    mask = F.pad(mask, (left, right, top, bottom), mode="replicate")
    return mask if canvas.wrap is None else canvas.wrap(mask)


def masked(canvas: Canvas, mask: Tensor, block_px: int) -> Canvas | None:
    """The blocks of a canvas that the white part of a mask needs; None where all is black.

    Args:
        mask: (1, 1, H, W) from `lay_mask`.

    Attention is one-way, so blocks below and to the right of the last block that is not black have
    no part in it, but for the LR picture of the next blocks.
    """
    drawn = mask[0, 0] > 0
    if not drawn.any():
        return None
    if canvas.wrap is not None:
        return replace(canvas, mask=mask)
    ends = (int(torch.nonzero(drawn.any(dim)).max()) + 1 for dim in (1, 0))
    sides = ((math.ceil(end / block_px) + 1) * block_px for end in ends)
    height, width = map(min, sides, canvas.concat.shape[-2:])

    def part(x: Tensor) -> Tensor:
        return x[..., :height, :width]

    return replace(
        canvas,
        concat=part(canvas.concat),
        lr=canvas.lr[..., : height // LR_SCALE, : width // LR_SCALE],
        start=None if canvas.start is None else part(canvas.start),
        mask=part(mask),
        noise_size=canvas.concat.shape[-2:],
    )


def paste(x: Tensor, canvas: Canvas) -> Tensor:
    """A drawn part (B, 3, h, w) of a canvas in the whole (B, 3, H, W)."""
    whole = canvas.first.to(x, copy=True)
    whole[..., : x.shape[-2], : x.shape[-1]] = x
    return whole
