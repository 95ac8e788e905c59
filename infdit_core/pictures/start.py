"""A picture to start from in place of the enlarged one, such as another upscaler's."""

from __future__ import annotations

from torch import Tensor

from .prepare import MAX_SHRINK, PreparationError, check_image


def check_start(start: Tensor, batch: int, size: tuple[int, int]) -> None:
    """Refuse pictures that sampling cannot start from.

    Args:
        start: (1 or batch, h, w, C) in 0..1, in the shape of the result.
        batch: the number of pictures that are upscaled.
        size: (height, width) of the result.

    Raises:
        PreparationError: no pictures, too few or too many of them, too large or of another shape.
    """
    try:
        check_image(start)
    except PreparationError as error:
        raise PreparationError(f"the picture to start from: {error}") from None
    if len(start) not in (1, batch):
        expected = f"1 or {batch} pictures" if batch > 1 else "1 picture"
        raise PreparationError(f"expected {expected} to start from; got {len(start)}")
    height, width = start.shape[1:3]
    if not same_shape((height, width), size) or height > MAX_SHRINK * size[0]:
        raise PreparationError(
            f"expected a picture to start from in the shape of the result, {size[1]}×{size[0]} px,"
            f" and at most {MAX_SHRINK} times as large; got {width}×{height} px"
        )


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two (height, width) have one aspect ratio, but for a pixel of rounding."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)
