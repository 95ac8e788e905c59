"""Whether a picture fits the RAM, asked before any work is done on it.

The system does not refuse an allocation that it cannot serve: it ends the process later, and with
it a whole ComfyUI. So what is certain to be too large is refused here.
"""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch

from .planner import SAMPLER_PICTURES, PlanError, gigabytes

_PICTURE_BYTES_PER_PX = 3 * 4
_PREPARED_PICTURES = 3
"""On the host whatever the device: the prepared picture, the noise and the samples."""

_CGROUP = Path("/sys/fs/cgroup")


def require_memory(
    size: tuple[int, int], device: str | torch.device, results: int = 1, at_once: int = 1
) -> None:
    """Refuse what cannot fit the RAM.

    Args:
        size: (height, width) of a result in pixels.
        device: of the network; on the CPU the solver's pictures count too.
        results: pictures that are kept.
        at_once: pictures worked on together.

    Raises:
        PlanError: more is needed than there is.
    """
    on_cpu = torch.device(device).type == "cpu"
    working = 1 + SAMPLER_PICTURES if on_cpu else _PREPARED_PICTURES
    needed = math.prod(size) * _PICTURE_BYTES_PER_PX * (results + at_once * working)
    many = f"{results} pictures of " if results > 1 else ""
    what = f"{many}{size[1]}×{size[0]} px"
    require_bytes(needed, what, "a smaller result or fewer pictures at a time")


def require_bytes(needed: float, what: str, expected: str) -> None:
    """Refuse `what` where it needs more bytes of RAM than there are.

    Raises:
        PlanError: says `what` was asked for and what was `expected` instead.
    """
    free = available_bytes()
    if needed > free:
        raise PlanError(
            f"{what} need at least {gigabytes(needed)} of RAM; {gigabytes(free)} are free."
            f" Expected {expected}"
        )


def available_bytes() -> float:
    """RAM and swap that can be had now, in a container its share."""
    system = psutil.virtual_memory().available + psutil.swap_memory().free
    return min(system, _container_bytes())


def _container_bytes() -> float:
    """What the control group (version 2) of this process leaves, its page cache counted as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        rows = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in rows}
    except (OSError, ValueError):
        return math.inf
    if limit == "max":
        return math.inf
    return int(limit) - used + stat.get("inactive_file", 0) + stat.get("active_file", 0)
