"""The attention kernels of PyTorch that say the log-sum-exp of their scores too, and the fastest.

Which is fastest depends on the card, the driver and the shape: it is measured once a shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import fast

Backend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""q (N, A, S, d) and k, v (N, A, T, d) to the attention (N, A, S, d) and the natural logarithms of
the sums of exp(q·kᵀ/√d), (N, A, S) float32. Forward only."""

_RUNS = 3
_CLEARLY = 0.95
"""Share of the seconds of the one before that another must stay under: noise is no reason."""

aten = torch.ops.aten
logger = logging.getLogger(__name__)


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]  # it may be longer


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype not in (torch.float16, torch.bfloat16):  # torch would take the bits for float16
        raise RuntimeError(f"cuDNN attends in half precision only, got {q.dtype}")
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.flatten(2)  # (N, A, S, 1) in some versions


def flash_for_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "cpu": (flash_for_cpu,),
    "cuda": (flash, efficient, cudnn),
}
"""By type of device; the first that works is taken unless another is clearly faster."""

_fastest: dict[tuple, Backend | None] = {}


def fastest(q: Tensor, k: Tensor, v: Tensor) -> Backend | None:
    """The backend for tensors of this kind, which are not changed; None where none works."""
    kind = q.device, q.dtype, q.shape[1:], k.shape[2]
    if kind not in _fastest:
        candidates = list(_working(BACKENDS.get(q.device.type, ()), q, k, v))
        if len(candidates) > 1 and fast.uses("backends", q):
            _fastest[kind] = choose({b: _seconds(b, q, k, v) for b in candidates})
        else:
            _fastest[kind] = candidates[0] if candidates else None
        logger.info("Inf-DiT: attention for %s: %s", kind, _fastest[kind])
    return _fastest[kind]


def chosen() -> dict[str, str]:
    """The names of the backends in use, by what they attend to."""
    return {
        f"{dtype} {tuple(q)}, {keys} keys".removeprefix("torch."): backend.__name__
        if backend
        else "none"
        for (_, dtype, q, keys), backend in _fastest.items()
    }


def forget() -> None:
    """Choose anew."""
    _fastest.clear()


def choose(seconds: dict[Backend, float]) -> Backend:
    """The fastest, or one that comes before it and is hardly slower."""
    best, *others = seconds
    for other in others:
        if seconds[other] < _CLEARLY * seconds[best]:
            best = other
    return best


def _working(backends: tuple[Backend, ...], q: Tensor, k: Tensor, v: Tensor) -> Iterator[Backend]:
    for backend in backends:
        try:
            backend(q, k, v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.debug("Inf-DiT: no attention with %s: %s", backend.__name__, error)
        else:
            yield backend


def _seconds(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of a run on a GPU, which has been warmed up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_RUNS):
        backend(q, k, v)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / _RUNS
