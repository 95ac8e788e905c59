"""Nodes for the tests alone: inputs that no other node makes, and what the server holds.

A test server gets this folder beside the pack; nothing of it is shipped.
"""

import gc
import json
import os
from typing import ClassVar

import torch

IMAGES = {
    "nan": lambda: torch.full((1, 8, 8, 3), float("nan")),
    "one nan": lambda: torch.zeros(1, 8, 8, 3).index_fill_(1, torch.tensor(3), float("nan")),
    "infinite": lambda: torch.full((1, 8, 8, 3), float("inf")),
    "batch 0": lambda: torch.zeros(0, 8, 8, 3),
    "height 0": lambda: torch.zeros(1, 0, 8, 3),
    "width 0": lambda: torch.zeros(1, 8, 0, 3),
    "5-D": lambda: torch.zeros(1, 1, 8, 8, 3),
    "3-D": lambda: torch.zeros(8, 8, 3),
    "0-D": lambda: torch.tensor(0.5),
    "2 channels": lambda: torch.zeros(1, 8, 8, 2),
    "9 channels": lambda: torch.zeros(1, 8, 8, 9),
    "integers": lambda: torch.zeros(1, 8, 8, 3, dtype=torch.int64),
    "complex": lambda: torch.zeros(1, 8, 8, 3, dtype=torch.complex64),
    "out of range": lambda: torch.full((1, 8, 8, 3), 1e30),
    "half": lambda: torch.full((1, 8, 8, 3), 0.5, dtype=torch.float16),
    "one pixel": lambda: torch.zeros(1, 1, 1, 3),
}

LATENTS = {
    "nan": lambda: torch.full((1, 3, 32, 64), float("nan")),
    "right": lambda: torch.zeros(1, 3, 32, 64),
    "batch 0": lambda: torch.zeros(0, 3, 32, 64),
    "batch 3": lambda: torch.zeros(3, 3, 32, 64),
    "of Stable Diffusion": lambda: torch.zeros(1, 4, 8, 8),
    "5-D": lambda: torch.zeros(1, 3, 1, 32, 64),
    "0-D": lambda: torch.tensor(0.0),
    "integers": lambda: torch.zeros(1, 3, 32, 64, dtype=torch.int64),
    "half": lambda: torch.zeros(1, 3, 32, 64, dtype=torch.float16),
}


class DebugNode:
    """What ComfyUI reads of a node."""

    INPUTS: ClassVar[dict[str, tuple]]
    RETURN_TYPES: ClassVar[tuple[str, ...]]
    FUNCTION = "run"
    CATEGORY = "debug"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": cls.INPUTS}


class DebugImage(DebugNode):
    """IMAGE of a kind in `IMAGES`."""

    INPUTS: ClassVar = {"kind": (list(IMAGES),)}
    RETURN_TYPES = ("IMAGE",)

    def run(self, kind: str) -> tuple:
        return (IMAGES[kind](),)


class DebugLatent(DebugNode):
    """LATENT of a kind in `LATENTS`."""

    INPUTS: ClassVar = {"kind": (list(LATENTS),)}
    RETURN_TYPES = ("LATENT",)

    def run(self, kind: str) -> tuple:
        return ({"samples": LATENTS[kind]()},)


class DebugSigmas(DebugNode):
    """SIGMAS as given."""

    INPUTS: ClassVar = {"values": ("STRING", {"default": "[]"})}
    RETURN_TYPES = ("SIGMAS",)

    def run(self, values: str) -> tuple:
        return (torch.tensor(json.loads(values), dtype=torch.float32),)


class DebugCounts(DebugNode):
    """Says what the process holds, after `image` is there."""

    INPUTS: ClassVar = {"image": ("IMAGE",), "tag": ("INT", {"default": 0})}
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    def run(self, image: torch.Tensor, tag: int) -> dict:
        gc.collect()
        # A type's own word for it: asking some lazy objects would import things.
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        with open("/proc/self/status") as status:
            rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        counts = {
            "tensors": len(tensors),
            "tensor_mib": sum(storages.values()) / 2**20,
            "rss_mib": rss / 1024,
            "files": len(os.listdir("/proc/self/fd")),
        }
        return {"ui": {"counts": [counts]}}


_NODES = (DebugImage, DebugLatent, DebugSigmas, DebugCounts)
NODE_CLASS_MAPPINGS = {c.__name__: c for c in _NODES}
