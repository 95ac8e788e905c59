"""Ways to compute the same in fewer passes over memory, and the devices where each is used.

A way that is not used, because of the device, of a gradient or of a tool that is missing, leaves
the plain path of PyTorch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor, nn

DEVICES: dict[str, set[str]] = {
    "norm": {"cpu", "cuda", "mps", "xpu"},
    "place": {"cuda"},
    "join": {"cuda"},
    "gelu": {"cuda"},
    "backends": {"cuda"},
}
"""Types of devices by way; a benchmark takes some away, a test adds some.

- norm: shift and scale as the affine parameters of LayerNorm, where there is one picture.
- place: normalisation and rotary of queries and keys and the copy of values in one kernel.
- join: attention to each of the four neighbours where they are, joined by the log-sum-exps.
- gelu: as the epilogue of the first linear layer of the MLP. On a CPU that is another gelu.
- backends: the attention kernel that is measured to be the fastest. On a CPU there is one.
"""

_counted_as = ContextVar("counted_as", default="cpu")

logger = logging.getLogger(__name__)


@contextmanager
def counted_as(device_type: str) -> Iterator[None]:
    """On the meta device take the ways of this type of device: of a CPU outside."""
    token = _counted_as.set(device_type)
    try:
        yield
    finally:
        _counted_as.reset(token)


def uses(way: str, x: Tensor) -> bool:
    """Whether a computation on x goes that way."""
    if torch.compiler.is_compiling():  # the compiler finds its own
        return False
    kind = _counted_as.get() if x.device.type == "meta" else x.device.type
    if kind not in DEVICES[way] or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return way not in ("place", "join") or _kernels_work(x.device)


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer does to x what its weight and bias say, as they are.

    Layers of ComfyUI may cast or patch them at use, others may be quantised: those are called.
    """
    if not isinstance(layer, nn.Linear | nn.LayerNorm) or layer.bias is None:
        return False
    at_use = ("comfy_cast_weights", "weight_function", "bias_function")
    if any(getattr(layer, name, False) for name in at_use):
        return False
    return layer.weight.device == x.device and layer.weight.dtype == layer.bias.dtype == x.dtype


@lru_cache
def _kernels_work(device: torch.device) -> bool:
    """Whether Triton is there and finds what it needs: a compiler, a device that is new enough."""
    try:
        from . import kernels

        if device.type != "meta":
            kernels.try_out(device)
    except Exception as error:  # whatever it is, the same is computed without
        logger.info("Inf-DiT: no Triton kernels on %s: %s", device, error)
        return False
    return True
