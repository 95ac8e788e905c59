"""Measures of pictures (1, 3, H, W) in 0..1, and the limits that they are held to: a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import piq
import torch
from torch import Tensor

from training.data import reduce_bicubic

REFERENCE_METRICS = {
    "gmsd": piq.gmsd,
    "haarpsi": piq.haarpsi,
    "vifp": piq.vif_p,
    "fsim": piq.fsim,
    "psnr": piq.psnr,
    "ssim": partial(piq.ssim, downsample=False),
}
"""Against the original; the greater the better, but for GMSD."""
LOWER_IS_BETTER = {"gmsd"}
MIN_CONSISTENCY_DB = 32.0
MAX_SEAM = 0.03
MAX_COLOUR_SHIFT = 1.0


def against_original(picture: Tensor, original: Tensor) -> dict[str, float]:
    """The full-reference metrics of piq, means over the picture."""
    with torch.no_grad():
        return {name: float(f(picture, original)) for name, f in REFERENCE_METRICS.items()}


def against_input(picture: Tensor, lr: Tensor) -> dict[str, float]:
    """How well a picture, reduced by 4 in 8-bit levels, is the (1, 3, H/4, W/4) it was made from.

    Returns:
        `consistency_db`: PSNR of the reduced picture; `colour_shift`: difference of the mean
        colours in 1/255, of the channel where it is greatest.
    """
    reduced = (reduce_bicubic(picture * 2 - 1) + 1) / 2
    error = (reduced - lr).square().mean().item()
    shift = (picture.mean((0, 2, 3)) - lr.mean((0, 2, 3))).abs().max().item() * 255
    return {"consistency_db": -10 * math.log10(max(error, 1e-10)), "colour_shift": shift}


def borders(picture: Tensor, block_px: int, patch_px: int) -> dict[str, float]:
    """Gradient energy at borders over that elsewhere; a picture that knows no borders has 1.

    Returns:
        `block_borders`: of blocks over other patches; `block_lines` and `patch_borders`: of blocks
        and of patches over all other lines.
    """
    return {
        "block_borders": border_ratio(picture, block_px, patch_px),
        "block_lines": border_ratio(picture, block_px),
        "patch_borders": border_ratio(picture, patch_px),
    }


def border_ratio(picture: Tensor, period_px: int, step_px: int = 1) -> float:
    """Squared gradient across lines at multiples of period_px over that across all other lines.

    Args:
        step_px: only lines at multiples of this count. Enlarging by 4 makes gradients depend on the
            place within 4 px, even by bicubic interpolation.
    """
    at_border, elsewhere = [], []
    for dim in (-2, -1):
        gradient = picture.diff(dim=dim).square()
        lines = torch.arange(step_px, picture.shape[dim], step_px)
        energy = gradient.index_select(dim, lines - 1)  # line i is between pixels i - 1 and i
        border = lines % period_px == 0
        at_border.append(energy.index_select(dim, torch.where(border)[0]).flatten())
        elsewhere.append(energy.index_select(dim, torch.where(~border)[0]).flatten())
    return (torch.cat(at_border).mean() / torch.cat(elsewhere).mean()).item()


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every column."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@dataclass(frozen=True)
class Bar:
    """One requirement: what was measured, the limit, and whether it holds."""

    name: str
    value: float
    limit: float
    passed: bool


def bars(ours: Mapping[str, float], bicubic: Mapping[str, float], degradation: str) -> list[Bar]:
    """The requirements for the means over a set, of the model and of bicubic enlargement."""
    found = []
    for name in ("gmsd", "haarpsi", "vifp", "fsim"):
        value, limit = ours[name], bicubic[name]
        better = value < limit if name in LOWER_IS_BETTER else value > limit
        found.append(Bar(f"{name} better than bicubic's", value, limit, better))
    if degradation == "bicubic":  # noise and JPEG should not come back when reduced
        value = ours["consistency_db"]
        passed = value >= MIN_CONSISTENCY_DB
        found.append(Bar("input matched, dB", value, MIN_CONSISTENCY_DB, passed))
    value = abs(ours["block_seam"])
    found.append(Bar("gradient energy at block borders", value, MAX_SEAM, value <= MAX_SEAM))
    value = ours["colour_shift"]
    found.append(Bar("colour shift in 1/255", value, MAX_COLOUR_SHIFT, value < MAX_COLOUR_SHIFT))
    return found


def passed(found: Sequence[Bar]) -> bool:
    """Whether all hold, with one of VIFp and FSIM enough."""
    either = [bar.passed for bar in found if bar.name.startswith(("vifp", "fsim"))]
    others = [bar.passed for bar in found if not bar.name.startswith(("vifp", "fsim"))]
    return any(either) and all(others)
