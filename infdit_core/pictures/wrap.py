"""Textures and panoramas: pictures that go on around at their edges.

The canvas gets a margin that repeats the other side of the picture. What is drawn in the margin is
thrown away in every evaluation and the other side's taken in its place: so the picture that the
solver works on goes on around in every step, and blocks at the edge see what really lies there.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..network.config import LR_SCALE
from ..scratch import Empty, in_memory
from .prepare import Canvas, PreparationError, Wrap, check_image, check_sizes, prepare
from .resize import Axis

WRAPS = ("none", "horizontal", "both")
"""Which edges go on around: none, left and right, or all four."""
MARGIN_BLOCKS = 1
"""Of context before the first block; a block sees more, of less and less weight.

Energy of the third difference over the seam, in shares of that at the same places within the
picture, for 8 photographs and the bundled model: 4.7 without wrap; with one block behind, 2.0, 0.7,
0.9 and 0.8 for 0, 1, 2 and 4 blocks before; 1.5 for 1 block before and none behind.
"""
AFTER_BLOCKS = 1
"""Of context behind the last block, of which only the LR picture is seen."""


def check_wrap(wrap: str, colour_fix: str = "none") -> None:
    """Raise PreparationError unless `wrap` is one of `WRAPS` and the colours can be fixed with it.

    The wavelet fix compares blurred pictures, and the blur ends at the edges.
    """
    if wrap not in WRAPS:
        raise PreparationError(f"expected wrap to be one of {', '.join(WRAPS)}; got {wrap!r}")
    if wrap != "none" and colour_fix == "wavelet":
        raise PreparationError(
            f"expected colour_fix none, adain or lab with wrap {wrap}; got wavelet, which makes a"
            " seam"
        )


def lay_out(
    image: Tensor,
    size: tuple[int, int],
    block_px: int,
    wrap: str = "none",
    empty: Empty = in_memory,
) -> Canvas:
    """`prepare`, or `prepare_wrapped` where edges of the picture go on around."""
    if wrap == "none":
        return prepare(image, size=size, block_px=block_px, empty=empty)
    return prepare_wrapped(image, size, block_px, wrap)


def prepare_wrapped(
    image: Tensor,
    size: tuple[int, int],
    block_px: int,
    wrap: str,
    *,
    margin: int = MARGIN_BLOCKS,
    after: int = AFTER_BLOCKS,
) -> Canvas:
    """Lay a picture that goes on around out for upscaling, as `prepare` does others.

    Args:
        image: (B, H, W, C) in 0..1, C = 1 (grey), 3 or 4 (alpha).
        size: (height, width) of the result in pixels.
        block_px: side of a block of the model.
        wrap: "horizontal" or "both".
        margin: blocks of context before the picture.
        after: blocks of context behind it.

    Raises:
        PreparationError: not a picture, not finite, or a size of nothing.
    """
    check_image(image)
    check_sizes(image, size)
    rows, columns = (
        Axis.of(side, target, block_px, around, margin, after)
        for side, target, around in zip(image.shape[1:3], size, (wrap == "both", True), strict=True)
    )
    pixels = image.float().permute(0, 3, 1, 2).clamp(0, 1)

    def resized(x: Tensor, shrink: int = 1) -> Tensor:
        return columns.resize(rows.resize(x, -2, shrink), -1, shrink)

    alpha = None
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:]
        for dim, axis in ((-2, rows), (-1, columns)):
            alpha = replace(axis, before=0, padded=axis.target).resize(alpha, dim)
        alpha = alpha.clamp(0, 1).permute(0, 2, 3, 1)
    source = pixels[:, :3].expand(-1, 3, -1, -1) * 2 - 1
    return Canvas(
        resized(source).clamp(-1, 1),
        resized(source, LR_SCALE),
        *size,
        image,
        alpha,
        top=rows.before,
        left=columns.before,
        wrap=Wrap(rows.index(), columns.index()),
    )
