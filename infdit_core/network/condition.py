"""What the denoiser is conditioned on: the low-resolution picture and its CLIP embedding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Condition:
    """The condition of a picture of (H, W) pixels, both multiples of the model's block side."""

    concat: Tensor
    """(B, 3, H, W) in [-1, 1]: the low-resolution picture resized to the target."""
    lr: Tensor
    """(B, 3, H/4, W/4), about [-1, 1]: the low-resolution picture at a quarter of the target."""
    vector: Tensor | None = None
    """(B, vector_size) unit-length CLIP embedding; None for a model without `cond_embed`."""
    origin: tuple[int, int] = (0, 0)
    """Row and column in patches of the top left corner, for a crop of a larger picture."""
