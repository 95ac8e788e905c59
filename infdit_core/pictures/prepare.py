"""From a picture to the network's inputs and back, without losing a pixel.

The release crops pictures to a multiple of its block size. Here they are continued by reflection,
at the bottom and right only: blocks see nothing below or to the right of them, so what is added
there cannot disturb more than the blocks it lies in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bands import row_bands
from ..errors import InfDiTError
from ..network.condition import Condition
from ..network.config import LR_SCALE
from ..scratch import Empty, in_memory
from .resize import Axis, axes, enlarge, extend, reach, resize, resize_into, resized

logger = logging.getLogger(__name__)

WHOLE_PX = 2**22
"""Pixels of a canvas that is made at once; a larger one is made by bands of rows. Pictures up to
2048×2048 so keep the bits that they had before there were bands."""
MAX_SHRINK = 4
"""A smaller result would need more padding than picture."""


class PreparationError(InfDiTError):
    """The picture or the size asked for cannot be worked on."""


@dataclass(frozen=True)
class Wrap:
    """Where each row and column of a canvas has its pixels from."""

    rows: Tensor | None
    """(H,) numbers of rows of the canvas; None leaves rows as they are."""
    columns: Tensor | None
    """(W,), as rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """A (..., H, W) with the margins as the picture has them."""
        if self.rows is not None:
            x = x.index_select(-2, self.rows.to(x.device))
        if self.columns is not None:
            x = x.index_select(-1, self.columns.to(x.device))
        return x


@dataclass
class Canvas:
    """A picture made ready: the network's inputs, and what is needed to get a picture back."""

    concat: Tensor
    """(B, 3, H, W) float32 in [-1, 1]: the picture at the target size, padded to whole blocks."""
    lr: Tensor
    """(B, 3, H/4, W/4) float32, about [-1, 1]: a quarter of that."""
    height: int
    width: int
    """The target size in pixels, without padding."""
    source: Tensor
    """(B, h, w, C) in 0..1: the picture itself, not a copy."""
    alpha: Tensor | None = None
    """(B, height, width, 1) float32 in 0..1, if the picture had alpha."""
    vector: Tensor | None = None
    """(B, vector_size) CLIP embedding, for models that take one."""
    start: Tensor | None = None
    """(B, 3, H, W) float32 in [-1, 1]: what sampling starts from in place of `concat`."""
    top: int = 0
    left: int = 0
    """Where the target lies on the canvas, in pixels."""
    wrap: Wrap | None = None
    """What the margins repeat, of a picture that goes on around."""
    mask: Tensor | None = None
    """(B, 1, H, W) in 0..1: 1 is drawn, 0 keeps `first`."""
    noise_size: tuple[int, int] | None = None
    """(height, width) that noise is drawn for, of which a part of a canvas takes the top left."""

    @property
    def first(self) -> Tensor:
        """(B, 3, H, W): the picture that sampling starts from, without noise."""
        return self.concat if self.start is None else self.start

    @property
    def scale(self) -> float:
        """How many times higher or wider the target is than the picture: the larger of both."""
        return max(self.height / self.source.shape[1], self.width / self.source.shape[2])

    def source_pixels(
        self, margin: int = 0, empty: Empty = in_memory
    ) -> tuple[Tensor, tuple[int, int]]:
        """The picture itself as (B, 3, h, w) float32 in [-1, 1], without alpha.

        Where it goes on around, `margin` pixels of the other side continue it; how many there are
        above and below, left and right, is the second value.
        """
        image = self.source
        source = empty((len(image), 3, *image.shape[1:3]), image.device)
        for rows in row_bands(image.shape[1], 3 * image.shape[2]):
            source[..., rows, :] = _colours(image[:, rows])
        sides = (-2, self.wrap and self.wrap.rows), (-1, self.wrap and self.wrap.columns)
        extended = [0 if around is None else margin for _, around in sides]
        for (dim, _), pixels in zip(sides, extended, strict=True):
            length = source.shape[dim]
            index = torch.arange(-pixels, length + pixels, device=source.device) % length
            source = source.index_select(dim, index) if pixels else source
        return source, (extended[0], extended[1])

    def consistent(self, x: Tensor, times: int, empty: Empty = in_memory) -> Tensor:
        """A sampled (B, 3, H, W) that, reduced again, comes nearer to the LR picture.

        Adds the enlarged difference of both, `times` over (back-projection).
        """
        for _ in range(times):
            x = self._nearer(x, empty)
        return x

    def _nearer(self, x: Tensor, empty: Empty) -> Tensor:
        lr = self.lr.to(x)
        if is_whole(x):
            return nearer(x, lr)
        missing, result = empty(lr.shape, x.device), empty(x.shape, x.device)
        for rows, reduced in resized(*axes(x, lr), lambda rows: x[..., rows, :]):
            missing[..., rows, :] = lr[..., rows, :] - reduced
        for rows, more in resized(*axes(lr, x), lambda rows: missing[..., rows, :]):
            result[..., rows, :] = x[..., rows, :] + more
        return result

    def noise(self, drawn: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Noise like `concat`, from what draws it by its shape."""
        height, width = self.concat.shape[-2:]
        shape = (*self.concat.shape[:2], *(self.noise_size or (height, width)))
        return drawn(shape)[..., :height, :width]

    def condition(self, vector: Tensor | None = None) -> Condition:
        """The condition for the denoiser, with a CLIP embedding (B, vector_size) or without."""
        return Condition(self.concat, self.lr, self.vector if vector is None else vector)

    def crop(self, x: Tensor) -> Tensor:
        """The target of (..., H, W) on the canvas: (..., height, width)."""
        rows = slice(self.top, self.top + self.height)
        return x[..., rows, self.left : self.left + self.width]

    def finish(self, x: Tensor, empty: Empty = in_memory) -> Tensor:
        """A sampled (B, 3, H, W) as a picture (B, height, width, 3, or 4 with alpha) in 0..1.

        Raises:
            PreparationError: x is not finite.
        """
        x, channels = self.crop(x), 3 if self.alpha is None else 4
        image = empty((len(x), self.height, self.width, channels), x.device)
        for rows in row_bands(self.height, 3 * self.width):
            band = x[..., rows, :]
            if not band.isfinite().all():
                raise PreparationError(
                    "expected finite pixels from the network; got NaN or infinity."
                    " Take bf16 or fp32 for its weights, or another sampler"
                )
            image[:, rows, :, :3] = ((band.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)
            if self.alpha is not None:
                image[:, rows, :, 3:] = self.alpha[:, rows]
        return image


def nearer(x: Tensor, lr: Tensor) -> Tensor:
    """A whole (B, 3, 4h, 4w) that, reduced again, comes nearer to lr (B, 3, h, w): one step."""
    missing = lr - resize(x, (1 / LR_SCALE, 1 / LR_SCALE), tuple(lr.shape[-2:]))
    return x + resize(missing, (LR_SCALE, LR_SCALE), tuple(x.shape[-2:]))


def is_whole(picture: Tensor) -> bool:
    """Whether a picture (..., H, W) is small enough to be resized at once."""
    return picture.shape[-2] * picture.shape[-1] <= WHOLE_PX


def prepare(
    image: Tensor,
    upscale_by: float = 4.0,
    *,
    size: tuple[int, int] | None = None,
    block_px: int = 128,
    empty: Empty = in_memory,
) -> Canvas:
    """Lay a picture out for upscaling.

    Args:
        image: (B, H, W, C) in 0..1, C = 1 (grey), 3 or 4 (alpha); it is not changed.
        upscale_by: how many times wider and higher the result is, rounded to whole pixels.
        size: (height, width) of the result in pixels, instead of `upscale_by`.
        block_px: side of a block of the model, `config.block_px`.
        empty: makes room for the pictures of a large canvas; those of a small one are in memory.

    Raises:
        PreparationError: not a picture, not finite, or a size of nothing.
    """
    check_image(image)
    source_size = image.shape[1], image.shape[2]
    if size is None:
        size = target_size(source_size, upscale_by)
    check_sizes(image, size)

    padded = tuple(math.ceil(side / block_px) * block_px for side in size)
    if math.prod(padded) > WHOLE_PX:
        return _prepared_by_bands(image, size, padded, empty)
    alpha = None
    if image.shape[-1] == 4:
        alpha = enlarge(_pixels(image[..., 3:]), size).clamp(0, 1).permute(0, 2, 3, 1)
    source = _colours(image)
    scale = tuple(target / side for target, side in zip(size, source_size, strict=True))
    source = extend(source, *map(reach, size, padded, scale))
    concat = resize(source, scale, padded).clamp(-1, 1)
    lr_scale = tuple(s / LR_SCALE for s in scale)
    lr = resize(source, lr_scale, tuple(p // LR_SCALE for p in padded))
    return Canvas(concat, lr, *size, image, alpha)


def _prepared_by_bands(
    image: Tensor, size: tuple[int, int], padded: tuple[int, ...], empty: Empty
) -> Canvas:
    """`prepare` of a large canvas."""
    batch, device = len(image), image.device
    sides = zip(image.shape[1:3], size, padded, strict=True)
    down, across = (Axis(source, target, 0, whole, False) for source, target, whole in sides)

    def colours(rows: slice) -> Tensor:
        return _colours(image[:, rows])

    concat = empty((batch, 3, *padded), device)
    for rows, band in resized(down, across, colours):
        concat[..., rows, :] = band.clamp_(-1, 1)
    lr = empty((batch, 3, *(side // LR_SCALE for side in padded)), device)
    for rows, band in resized(down, across, colours, LR_SCALE):
        lr[..., rows, :] = band
    alpha = None
    if image.shape[-1] == 4:
        alpha = empty((batch, 1, *size), device)
        resize_into(alpha, _pixels(image[..., 3:]), lambda band: band.clamp_(0, 1))
        alpha = alpha.permute(0, 2, 3, 1)
    return Canvas(concat, lr, *size, image, alpha)


MAX_FACTOR = 4.0
"""How much larger a picture can become in one pass: the networks are trained for this factor."""


def pass_sizes(source: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) after each of equal passes from source to target, the last being target."""
    factor = max(t / s for t, s in zip(target, source, strict=True))
    count = max(1, math.ceil(math.log(factor, MAX_FACTOR) - 1e-9)) if factor > 1 else 1
    steps = [
        tuple(s * (t / s) ** (i / count) for s, t in zip(source, target, strict=True))
        for i in range(1, count)
    ]
    return [(max(1, round(h)), max(1, round(w))) for h, w in steps] + [target]


def target_size(
    source: tuple[int, int],
    upscale_by: float,
    longest_edge: int | None = None,
    *,
    megapixels: float | None = None,
    within: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """(height, width) of a picture `upscale_by` times as wide and high, in whole pixels.

    Args:
        longest_edge: the longer side of the result in pixels, instead of the factor.
        megapixels: of the result, 1024 x 1024 pixels each; instead of the factor.
        within: (height, width) that the result just fits into, instead of the factor.

    What is asked for instead of the factor never makes a picture smaller: its own size is the
    least, with a warning.

    Raises:
        PreparationError: the factor is not above 0.
    """
    asked = None
    if longest_edge:
        asked, upscale_by = f"longest edge {longest_edge} px", longest_edge / max(source)
    elif megapixels:
        asked = f"{megapixels:g} megapixels"
        upscale_by = math.sqrt(megapixels * 1024**2 / math.prod(source))
    elif within:
        asked = f"to fit into {within[1]}×{within[0]} px"
        upscale_by = min(side / own for side, own in zip(within, source, strict=True))
    if asked and upscale_by < 1:
        logger.warning(
            "Inf-DiT: %s would shrink the picture; it keeps its %d×%d px",
            asked,
            source[1],
            source[0],
        )
        upscale_by = 1.0
    if not (math.isfinite(upscale_by * max(source)) and upscale_by > 0):
        raise PreparationError(f"expected a factor above 0, got {upscale_by}")
    height, width = (max(1, round(side * upscale_by)) for side in source)
    return height, width


def _pixels(image: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) float32 in 0..1."""
    return image.float().permute(0, 3, 1, 2).clamp(0, 1)


def _colours(image: Tensor) -> Tensor:
    """(B, H, W, C) as (B, 3, H, W) float32 in [-1, 1], without alpha."""
    return _pixels(image)[:, :3].expand(-1, 3, -1, -1) * 2 - 1


def check_image(image: Tensor) -> None:
    """Raise PreparationError unless this is (B, H, W, 1, 3 or 4) of finite floats."""
    shape = tuple(image.shape)
    if image.ndim != 4 or shape[-1] not in (1, 3, 4) or min(shape) < 1:
        raise PreparationError(
            "expected an image of shape (batch, height, width, 1, 3 or 4 channels) with at least"
            f" one pixel, got {shape}"
        )
    if not image.is_floating_point():
        raise PreparationError(f"expected floating point pixels in 0..1, got {image.dtype}")
    bands = row_bands(shape[1], shape[2] * shape[3])
    if not all(torch.isfinite(image[:, rows]).all() for rows in bands):
        raise PreparationError("expected finite pixels in 0..1, got NaN or infinity among them")


def check_sizes(image: Tensor, size: tuple[int, int]) -> None:
    """Raise PreparationError unless a picture can be made (height, width) of `size` at once."""
    source_size = image.shape[1], image.shape[2]
    if min(size) < 1:
        raise PreparationError(f"expected a size of at least 1×1 px, got {size[1]}×{size[0]}")
    if any(target < side // MAX_SHRINK for target, side in zip(size, source_size, strict=True)):
        raise PreparationError(
            f"expected a size of at least 1/{MAX_SHRINK} of the picture's"
            f" {source_size[1]}×{source_size[0]} px, got {size[1]}×{size[0]}"
        )
