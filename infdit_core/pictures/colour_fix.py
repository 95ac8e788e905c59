"""Giving a result the colours of the picture it was made from: over the whole picture, not blocks.

Means and deviations are compared at half the source's size, where a sharp result and a soft one
show the same: detail that the network added does not count. Wavelet, which keeps
what is finer than its low-pass anyway, works at the result's size, as StableSR (arXiv 2305.07015).

Invisible pixels count in neither: they are filled first, and means are weighed by the alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..bands import row_bands
from ..errors import InfDiTError
from ..scratch import Empty, in_memory
from .alpha import fill_invisible
from .prepare import is_whole
from .resize import enlarge, resize_into

COLOUR_FIXES = ("none", "wavelet", "adain", "lab")
"""wavelet: swaps what is coarser than about 32 px. adain: mean and deviation of red, green and
blue. lab: mean and deviation in CIELAB."""

_WAVELET_LEVELS = 5
_REACH_PX = 2**_WAVELET_LEVELS - 1
"""How far the low-pass sees: 1 + 2 + 4 + 8 + 16 px."""
_STRIP_PX = 2**21
"""Pixels worked on at a time."""
_EPSILON = 1e-5
"""Added to both deviations, so that a flat picture keeps its contrast."""
_MAX_GAIN = 2.0
"""Contrast is not raised by more: a result that lacks so much has another fault."""


def fix_colours(image: Tensor, source: Tensor, method: str, empty: Empty = in_memory) -> Tensor:
    """A result with its source's colours. Neither tensor is changed.

    Args:
        image: (B, H, W, 3 or 4) in 0..1, the result; alpha comes back as it is.
        source: (B, h, w, 1, 3 or 4) in 0..1, the picture it was made from, of any size.
        method: one of `COLOUR_FIXES`.
        empty: makes room for pictures.

    Returns:
        (B, H, W, 3 or 4) float32 in 0..1. Beside it, the work takes one picture of three channels
        (only wavelet does), of a picture with alpha two more, and a strip of rows.

    Raises:
        InfDiTError: the method is unknown.
    """
    if method not in COLOUR_FIXES:
        raise InfDiTError(
            f"unknown colour fix {method!r}, expected one of {', '.join(COLOUR_FIXES)}"
        )
    if method == "none":
        return image
    fixed = empty(image.shape, image.device)
    fixed[..., 3:] = image[..., 3:]
    for picture, result, wanted in zip(fixed, image.float(), source, strict=True):
        seen, wanted = (fill_invisible(x[None])[0].movedim(-1, 0) for x in (result, wanted))
        colours = seen[:3]
        reference = empty((3, *wanted.shape[1:]), colours.device)
        for rows in _strips(reference):
            reference[:, rows] = wanted[:3, rows].to(colours).clamp(0, 1)
        strips = (
            _wavelet(colours, reference, empty)
            if method == "wavelet"
            else _statistics(colours, reference, wanted[3:].to(colours), *_SPACES[method], empty)
        )
        for rows, strip in strips:
            picture[rows, :, :3] = strip.clamp(0, 1).movedim(0, -1)
    return fixed


def _wavelet(colours: Tensor, reference: Tensor, empty: Empty) -> Iterator[tuple[slice, Tensor]]:
    """The low-pass of the reference in place of that of the picture, both (3, H, W)."""
    height = colours.shape[-2]
    reference = _resize(reference, colours.shape[-2:], colours, empty)
    for rows in _strips(colours):
        start = max(0, rows.start - _REACH_PX)
        seen = slice(start, min(height, rows.stop + _REACH_PX))
        # the low-pass is linear: one of the difference does for both
        lacking = _low_pass(reference[:, seen] - colours[:, seen])
        yield rows, colours[:, rows] + lacking[:, rows.start - start :][:, : rows.stop - rows.start]


def _low_pass(x: Tensor) -> Tensor:
    """The approximation of (C, H, W) by the à trous wavelet with the kernel 1, 2, 1."""
    for level in range(_WAVELET_LEVELS):
        reach = 2**level
        for dim in (-2, -1):
            length = x.shape[dim]
            at = torch.arange(length, device=x.device)
            before = x.index_select(dim, (at - reach).clamp_(min=0))
            after = x.index_select(dim, (at + reach).clamp_(max=length - 1))
            x = before.add_(after).add_(x, alpha=2).div_(4)
    return x


def _statistics(
    colours: Tensor,
    reference: Tensor,
    alpha: Tensor,
    to_space: Callable[[Tensor], Tensor],
    from_space: Callable[[Tensor], Tensor],
    empty: Empty,
) -> Iterator[tuple[slice, Tensor]]:
    """Mean and deviation of each channel of a colour space as in the reference, both (3, H, W).

    Args:
        alpha: (1, H, W) in 0..1 of the reference, how much a pixel counts; (0, H, W): all as much.
    """
    size = [math.ceil(side / 2) for side in reference.shape[-2:]]
    seen, wanted = (_resize(x, size, colours, empty) for x in (colours, reference))
    weight = seen.new_ones(1, *size)
    if alpha.any():
        weight = _resize(alpha, size, colours, empty).clamp(0, 1)
    weight = weight / weight.sum()
    bands = [slice(None)] if is_whole(colours) else [*row_bands(size[0], 3 * size[1])]

    def weighed(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighed mean of what `value` makes of the colours of the space."""
        parts = (weight[:, rows] * value(to_space(x[:, rows])) for rows in bands)
        sums = (part.sum((-2, -1), keepdim=True) for part in parts)
        return sum(sums, start=x.new_zeros(()))

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = weighed(x, lambda colours: colours)
        return mean, weighed(x, lambda colours: (colours - mean).square()).sqrt() + _EPSILON

    (mean, deviation), (wanted_mean, wanted_deviation) = moments(seen), moments(wanted)
    gain = (wanted_deviation / deviation).clamp(max=_MAX_GAIN)
    for rows in _strips(colours):
        yield rows, from_space((to_space(colours[:, rows]) - mean) * gain + wanted_mean)


def _strips(x: Tensor) -> Iterator[slice]:
    height, width = x.shape[-2:]
    # no thinner than the low-pass sees, so that at most two thirds of its work are thrown away
    step = max(_STRIP_PX // width, _REACH_PX)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _resize(x: Tensor, size: Sequence[int], result: Tensor, empty: Empty) -> Tensor:
    """(C, H, W) at another size; by bands where the result (..., H, W) is large."""
    if is_whole(result):
        return enlarge(x[None], (size[0], size[1]))[0]
    return resize_into(empty((1, len(x), *size), x.device), x[None])[0]


# CIELAB of sRGB with the white point D65 (IEC 61966-2-1, CIE 15), L in 0..1 as a and b are scaled.
_RGB_TO_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
    dtype=torch.float64,
)
_WHITE = _RGB_TO_XYZ.sum(1, keepdim=True)
_RGB_TO_RELATIVE = _RGB_TO_XYZ / _WHITE
_F_TO_LAB = torch.tensor([[0.0, 1.16, 0.0], [5.0, -5.0, 0.0], [0.0, 2.0, -2.0]])
_DELTA = 6 / 29


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", matrix.to(x), x)


def to_lab(rgb: Tensor) -> Tensor:
    """(3, H, W) sRGB in 0..1 as CIELAB divided by 100, but for an offset of 0.16 in L."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    t = _mix(_RGB_TO_RELATIVE, linear)
    f = torch.where(t > _DELTA**3, t.clamp(min=_DELTA**3) ** (1 / 3), t / (3 * _DELTA**2) + 4 / 29)
    return _mix(_F_TO_LAB, f)


def from_lab(lab: Tensor) -> Tensor:
    """The inverse of `to_lab`; colours outside sRGB lie outside 0..1."""
    f = _mix(torch.linalg.inv(_F_TO_LAB.double()), lab)
    t = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    linear = _mix(torch.linalg.inv(_RGB_TO_RELATIVE), t)
    return torch.where(
        linear <= 0.0031308,
        linear * 12.92,
        1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055,
    )


_SPACES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "adain": (lambda x: x, lambda x: x),
    "lab": (to_lab, from_lab),
}
