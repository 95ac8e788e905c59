"""Time UNet evaluations with and without HiDiffusion: python -m benchmarks.hidiffusion ...

A UNet of SDXL's topology with random weights, its width reduced unless --full-width is given; by
turns plain and in every phase of HiDiffusion, so that ratios are of one run. Narrow layers make
attention a larger part of the whole than it is in SDXL, so the operations that SDXL itself needs
are counted besides. Needs a ComfyUI, in --comfyui or INFDIT_COMFYUI. Writes
benchmarks/results/hidiffusion_<device>_<dtype>_<width>.json after every size.
With a GPU: --full-width --device cuda --dtype fp16 --sizes 1024 1536 2048 4096
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from infdit_core.network.config import DTYPES

from . import common
from .common import RESULTS, ROOT

FULL, REDUCED = 320, 32
"""Channels of the first level: SDXL's, and those of the small stand-in."""
META = torch.device("meta")
MODES = {
    " + ".join(names) or "plain": mode
    for mode in itertools.product((False, True), repeat=3)
    for names in [itertools.compress(("dilated", "pooled", "windows"), mode)]
}
"""(RAD, pool, window attention)."""
STEPS = 30


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


def measure(evaluate: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict:
    """Seconds and, on a GPU, peak memory beside the weights of every mode."""
    common.in_turn(evaluate, 1, device)  # warms up
    seconds = common.in_turn(evaluate, rounds, device)
    found: dict[str, dict[str, Any]] = {
        name: {
            "seconds": [round(s, 4) for s in times],
            "of_plain": common.ratio(times, seconds["plain"]),
        }
        for name, times in seconds.items()
    }
    if device.type == "cuda":
        for name, run in evaluate.items():
            found[name]["peak_bytes"] = common.peak_bytes(run, device)
    return found


def operations(evaluate: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Floating-point operations of every mode."""
    counted = {}
    for name, run in evaluate.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counted[name] = counter.get_total_flops()
    return counted


def of_a_run(
    rules: ModuleType, size: tuple[int, int], cost: dict[str, float], windows: bool
) -> float:
    """Cost of a run of `STEPS` steps with the authors' phases, as a part of the plain model's."""
    ratios = rules.official_ratios(rules.SDXL, size, False)
    phases = rules.phases(rules.SDXL, ratios, aggressive=not rules.SDXL.is_large(size))
    names = {mode: name for name, mode in MODES.items()}
    rad, pool = phases.rad.steps(STEPS), phases.pool.steps(STEPS)
    total = sum(cost[names[i in rad, i in pool, windows]] for i in range(STEPS))
    return round(total / (STEPS * cost["plain"]), 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("hidiffusion", __doc__, "device", "dtype", "rounds", "comfyui")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536, 2048])
    parser.add_argument("--full-width", action="store_true", help="SDXL's own width, 2.6 G weights")
    args = common.parse(parser, argv)
    device, dtype = args.device, DTYPES[args.dtype]
    width = FULL if args.full_width else REDUCED

    hooks, rules = load_pack(args.comfyui, device)
    timed = (*build_unet(width, dtype, device), device)
    counted = (*build_unet(FULL, dtype, META), META)
    patch = hooks.Patch(rules.SDXL, hooks.Mode.AUTO, True, None, 0, False, False)
    attention = importlib.import_module("comfy.ldm.modules.attention").optimized_attention

    def evaluation(unet, cond, device, side: int, mode: tuple[bool, ...]) -> Callable[[], Any]:
        rad, pool, windows = mode
        size = side // 8, side // 8
        x = torch.randn(1, 4, *size, dtype=dtype, device=device)
        t = torch.full((1,), 500.0, device=device)

        def run() -> torch.Tensor:
            sizes = rules.feature_sizes(rules.SDXL, size, rad, pool)
            changes = hooks.Changes(rules.SDXL, sizes, rad, pool)
            changes = patch.with_windows(changes, 0, device) if windows else changes
            options = hooks.install(changes, {}) if any(mode) else {}
            with torch.inference_mode():
                return unet(x, t, transformer_options=options, **cond)

        return run

    result = common.header(args, "dtype", attention=attention.__name__, width=width, sizes={})
    path = RESULTS / f"hidiffusion_{device.type}_{args.dtype}_{width}.json"
    for side in args.sizes:
        modes = {name: evaluation(*timed, side, mode) for name, mode in MODES.items()}
        measured = measure(modes, args.rounds, device)
        modes = {name: evaluation(*counted, side, mode) for name, mode in MODES.items()}
        flop = operations(modes)
        costs = {"seconds": {k: row["of_plain"] for k, row in measured.items()}, "flop": flop}
        runs = {
            f"{name}, {unit}": of_a_run(rules, (side // 8, side // 8), cost, windows)
            for name, windows in (("RAU-Net", False), ("RAU-Net + windows", True))
            for unit, cost in costs.items()
        }
        result["sizes"][side] = {
            "evaluation": measured,
            "flop_at_full_width": flop,
            f"run_of_{STEPS}_steps_of_plain": runs,
        }
        common.save(path, result)
        print(side, costs["seconds"], runs, flush=True)


if __name__ == "__main__":
    main()
