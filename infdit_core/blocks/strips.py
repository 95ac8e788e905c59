"""The strips of one picture at work side by side in this process, a device and a thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .grid import Grid, Strip
from .link import LocalLinks, StripsStopped

T = TypeVar("T")


def in_strips(
    grid: Grid,
    devices: Sequence[torch.device],
    compute: Callable[[Strip, torch.device], T],
    speeds: Sequence[float] | None = None,
) -> list[T]:
    """What `compute` returns for each strip of a picture, on as many devices as it has lines for.

    Args:
        grid: of the picture.
        devices: of the strips, from the first to the last.
        compute: called in a thread for each strip.
        speeds: of the devices, in relation to each other; all the same if None.

    Raises:
        the error of the first strip that failed; the others stop.
    """
    devices = devices[: grid.lines]
    shares = (speeds or [1.0] * len(devices))[: grid.lines]
    links = LocalLinks(len(devices))
    strips = [
        Strip(grid, chunk, link)
        for chunk, link in zip(grid.strips(shares), links.links, strict=True)
    ]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    failures: list[BaseException] = []

    def work(strip: Strip, device: torch.device) -> T:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                return compute(strip, device)
        except BaseException as error:
            if not isinstance(error, StripsStopped):
                failures.append(error)
            links.stop()
            raise

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(work, *job) for job in zip(strips, devices, strict=True)]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
