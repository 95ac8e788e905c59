"""SDXL's UNet for the benchmarks, and one evaluation of it with HiDiffusion's hooks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import common
from .common import ROOT

FULL = 320
"""Channels of SDXL's first level."""
META = torch.device("meta")


def load_pack(comfyui: Path | None, device: torch.device) -> tuple[ModuleType, ModuleType]:
    """The modules with the hooks and with the rules, loaded as ComfyUI loads this pack."""
    common.add_comfyui(comfyui, device)
    # as on a GPU, on a CPU too
    importlib.import_module("comfy.cli_args").args.use_pytorch_cross_attention = True
    importlib.import_module("nodes")
    spec = importlib.util.spec_from_file_location(
        "comfyui_infdit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = sys.modules["comfyui_infdit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    room = "comfyui_infdit.nodes.hidiffusion"
    return importlib.import_module(f"{room}.hooks"), importlib.import_module(f"{room}.rules")


def build_unet(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict]:
    """SDXL's UNet at `width`, and what it is conditioned on."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    full = width == FULL
    context_dim, vector = (2048, 2816) if full else (64, 64)
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=width,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        num_head_channels=64 if full else 16,
        use_spatial_transformer=True,
        context_dim=context_dim,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=vector,
        dtype=dtype,
        device=device,
        operations=disable_weight_init,
    )
    torch.manual_seed(0)
    for parameter in unet.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0)
    like = {"dtype": dtype, "device": device}
    return unet.eval(), {
        "context": torch.randn(1, 77, context_dim, **like),
        "y": torch.randn(1, vector, **like),
    }


def evaluation(
    hooks: ModuleType, rules: ModuleType, unet: Any, cond: dict, side: int, mode: tuple[bool, ...]
) -> Callable[[], torch.Tensor]:
    """One evaluation for a picture of side×side px; `mode`: (RAD, pool, window attention)."""
    rad, pool, windows = mode
    size = side // 8, side // 8
    like = {"dtype": cond["context"].dtype, "device": cond["context"].device}
    x = torch.randn(1, 4, *size, **like)
    t = torch.full((1,), 500.0, device=like["device"])
    patch = hooks.Patch(rules.SDXL, hooks.Mode.AUTO, True, None, 0, False, False)

    def run() -> torch.Tensor:
        sizes = rules.feature_sizes(rules.SDXL, size, rad, pool)
        changes = hooks.Changes(rules.SDXL, sizes, rad, pool)
        changes = patch.with_windows(changes, 0, x.device) if windows else changes
        options = hooks.install(changes, {}) if any(mode) else {}
        with torch.inference_mode():
            return unet(x, t, transformer_options=options, **cond)

    return run


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
