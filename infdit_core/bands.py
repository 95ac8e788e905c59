"""Pictures in bands, so that work on them needs no temporary of their size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BAND = 2**20
"""Numbers worked on at a time: few enough for a cache, many enough for a GPU."""


def flat_bands(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors of one shape, small enough for a cache: the same places of each.

    Work on them needs no temporary of the tensors' size. Those that do not lie in one piece come
    whole.
    """
    if not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _BAND):
        yield tuple(t[start : start + _BAND] for t in flat)


def row_bands(height: int, row: int) -> Iterator[slice]:
    """Bands of rows, `row` numbers each, of about as many numbers as `flat_bands`."""
    step = max(1, _BAND // max(1, row))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))
