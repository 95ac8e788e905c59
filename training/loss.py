"""What training makes small: the loss of EDM, and where and how errors weigh beside it.

Every term is a squared error in some norm that the condition alone chooses. The mean of the
posterior, which is what D is to be, is the minimum of each; what changes is how a network that
falls short of it does so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from infdit_core.edm import SIGMA_DATA
from infdit_core.network.config import LR_SCALE
from training.data import local_variance

EXACT = 1.5 / 127.5
"""Error in [-1, 1] below which flat places need not be better: one and a half levels."""
SLOPE_FLOOR = 170 / 255**2
"""Squared slope below which edges count little, as in GMSD."""


def loss_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """The EDM weight of `|D - x0|²`: equal loss at every noise level at initialisation."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm_losses(error: Tensor, sigma: Tensor) -> Tensor:
    """(B,) the weighted squared errors of D, (B, 3, H, W), at noise levels (B,)."""
    return loss_weight(sigma) * error.square().mean(dim=(1, 2, 3))


def objective(
    error: Tensor,
    sigma: Tensor,
    known: Tensor | None = None,
    borders: tuple[int, ...] = (),
    border_weight: float = 0.0,
) -> Tensor:
    """(B,) what is trained on.

    Args:
        error: of D, (B, 3, H, W).
        sigma: (B,) noise levels.
        known: (B, 1, H, W) `local_weight`, which is added to the weight of EDM.
        borders: distances in pixels between the lines whose jumps are weighed.
        border_weight: of the jumps of the error across them.
    """
    weight = loss_weight(sigma)[:, None, None, None]
    if known is not None:
        weight = weight + known
    error = error * weight.sqrt()
    losses = error.square().mean(dim=(1, 2, 3))
    if border_weight:
        for period in borders:
            losses = losses + border_weight * border_jumps(error, period)
    return losses


def local_weight(lr: Tensor) -> Tensor:
    """(B, 1, H, W) inverse variance of what LR pictures (B, 3, H/4, W/4) leave open.

    EDM's weight is that of the posterior of a picture of variance 1/4 behind noise: 1/sigma² + 4.
    Given its LR picture, a place is known far better than that: the squared error of bicubic
    interpolation follows the variance of the 3×3 LR pixels around, from below one level (of 255) on
    a clear sky to thirty in foliage. Without this weight the sky is a thousandth of the loss, and
    the network leaves twice the error there that interpolation would.
    """
    weight = 1 / (EXACT**2 + local_variance(lr))
    return F.interpolate(weight, scale_factor=LR_SCALE, mode="nearest")


def gradient_similarity(ours: Tensor, original: Tensor) -> Tensor:
    """(B, h, w) how alike the edges of two pictures (B, 3, H, W) in [-1, 1] are: 1 for equal ones.

    That of gradient magnitudes at half the size (Xue et al., arXiv 1308.3052), whose deviation is
    GMSD. Where an edge could lie here or there, the mean of the posterior, which a squared error
    asks for, is a blur; this asks for an edge of its strength.
    """
    slopes = ours.new_tensor([[1, 0, -1]] * 3) / 3
    kernel = torch.stack([slopes, slopes.T])[:, None]

    def magnitude(picture: Tensor) -> Tensor:
        grey = F.avg_pool2d(picture.mean(dim=1, keepdim=True) / 2, 2)
        return F.conv2d(grey, kernel).square().sum(dim=1).add(1e-8).sqrt()  # (B, h, w)

    a, b = magnitude(ours), magnitude(original)
    return (2 * a * b + SLOPE_FLOOR) / (a.square() + b.square() + SLOPE_FLOOR)


def border_jumps(error: Tensor, period_px: int) -> Tensor:
    """(B,) mean squared jump of an error (B, C, H, W) across lines that are `period_px` apart.

    With it, where the network falls short, both sides of a border must fall short alike. A block
    knows the one before it and not the one after it, so it is the later one that learns to close
    the gap.
    """
    jumps = []
    for dim in (-2, -1):
        lines = torch.arange(period_px, error.shape[dim], period_px, device=error.device)
        jump = error.index_select(dim, lines) - error.index_select(dim, lines - 1)
        jumps.append(jump.square().mean(dim=(1, 2, 3)))
    return torch.stack(jumps).mean(dim=0)


class Balance:
    """Gradients of other losses made as long as that of the pixels, over some steps."""

    def __init__(self) -> None:
        self.lengths: dict[str, Tensor] = {}
        """By name, what a gradient is multiplied with."""

    def __call__(self, name: str, gradient: Tensor, pixels: Tensor) -> Tensor:
        ratio = pixels.norm() / (gradient.norm() + 1e-12)
        kept = self.lengths.get(name, ratio)
        self.lengths[name] = kept.lerp(ratio, 0.1)
        return gradient * self.lengths[name]
