"""Whether a picture fits the RAM, asked before any work is done on it.

The system does not refuse an allocation that it cannot serve: it ends the process later, and with
it a whole ComfyUI. So what is certain to be too large is refused here.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import psutil
import torch

from ..errors import InfDiTError

SAMPLER_PICTURES = 6
"""Float32 pictures of (3, H, W) while one is drawn, at most: the condition, the noisy picture, the
denoised one that the network writes, and three derivatives, which only one solver keeps."""
_PICTURE_BYTES_PER_PX = 3 * 4
_PREPARED_PICTURES = 3
"""On the host whatever the device: the prepared picture, the samples and the result."""
_WAITING_SHARE = 0.9
"""Of the free RAM that may be taken by what waits there; swap would cost more than it gives."""

_CGROUP, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_VERSIONS = {
    "": ("memory.max", "memory.current", "{}"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}"),
}
"""Control groups, version 2 and version 1, by the folder of their hierarchy: the files of the limit
and of what is used, and how the parts of that are called."""
_CACHE = ("inactive_file", "active_file")
"""Of what is used, page cache: as good as free."""


class PlanError(InfDiTError):
    """What was asked for does not fit the memory."""


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
    working = SAMPLER_PICTURES if on_cpu else _PREPARED_PICTURES
    # the result of what is drawn comes when the solver's pictures are gone
    pictures = results - 1 + at_once * working
    needed = math.prod(size) * _PICTURE_BYTES_PER_PX * pictures
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


def available_bytes(*, swap: bool = True) -> float:
    """RAM that can be had now, and swap if asked for; in a container its share."""
    system = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    return min(system, _container_bytes())


def waiting_bytes() -> float:
    """RAM that may be taken by what waits for its turn on a GPU."""
    return _WAITING_SHARE * available_bytes(swap=False)


def gigabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _container_bytes() -> float:
    """What the control groups of this process leave, the tightest of them."""
    try:
        rows = [row.split(":", 2) for row in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        rows = []
    left = math.inf
    for root, names in _VERSIONS.items():
        groups = {PurePosixPath("/")}  # all that a container may see, whatever its own is called
        for _, kinds, path in rows:
            if root in kinds.split(","):
                groups |= {PurePosixPath(path), *PurePosixPath(path).parents}
        for group in groups:
            left = min(left, _group_bytes(_CGROUP / root / group.relative_to("/"), *names))
    return left


def _group_bytes(folder: Path, limit: str, used: str, part: str) -> float:
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in rows}
        cache = sum(stat.get(part.format(name), 0) for name in _CACHE)
        return math.inf if most == "max" else int(most) - int(taken) + cache
    except (OSError, ValueError):
        return math.inf
