"""Count what large pictures of SDXL cost by method: python -m benchmarks.native_highres ...

Floating-point operations of SDXL's own UNet and VAE on the meta device, so without weights and
without computing anything: of one evaluation, and of a whole run with each method's defaults.
HiDiffusion decides by its own code what it does in which step, with its hooks in what is counted;
DiffuseHigh and Upsample Guidance are counted by their number of evaluations at each size. The VAE
is counted without tiles. Needs a ComfyUI, in --comfyui or INFDIT_COMFYUI. Writes
benchmarks/results/native_highres.json and prints it as the tables of docs/native_highres.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from tools.sdxl_checkpoint import VAE

from . import common
from .common import RESULTS
from .common_sdxl import FULL, META, build_unet, evaluation, load_pack, operations

NATIVE = 1024
SIDES = NATIVE, 1536, 2048
STEPS = 30
PROMPTS = 2
"""A prompt and a negative one, each evaluated in every step."""
STAGE_STEPS, STAGE_GUIDED = 15, 5
"""Of DiffuseHigh: the last 15 steps of 50, and in how many of them the VAE goes there and back."""
ETA = 0.6
"""Of Upsample Guidance: it acts in the first `ETA` of the model's 1000 timesteps."""


class Evaluation(NamedTuple):
    """Of the UNet, for a picture of side×side px."""

    side: int
    rad: bool = False
    pool: bool = False
    windows: bool = False


Calls = Counter[Evaluation]
"""Evaluations for one prompt in a run."""
Pictures = Counter[tuple[str, int]]
"""How often the VAE works in a run: ("decode" or "encode", side)."""


def plain(side: int, windows: bool = False) -> Calls:
    return Counter({Evaluation(side, windows=windows): STEPS})


def hidiffusion(hooks: ModuleType, rules: ModuleType, side: int, sigmas: torch.Tensor) -> Calls:
    """As its code decides with the node's defaults, step by step."""
    patch = hooks.Patch(rules.SDXL, hooks.Mode.AUTO, True, None, 0, False, False)
    x = torch.empty(1, 4, side // 8, side // 8, device=META)
    steps = [patch.changes(x, float(s), {"sample_sigmas": sigmas}, None) for s in sigmas[:-1]]
    return Counter(Evaluation(side, step.rad, step.pool, bool(step.windows)) for step in steps)


def diffusehigh(side: int, windows: bool = False) -> tuple[Calls, Pictures]:
    """A picture of native size, then a stage for each size up to `side`."""
    calls, pictures = plain(NATIVE), Counter({("decode", NATIVE): 1})
    for stage in SIDES[1:]:
        if stage <= side:
            calls[Evaluation(stage, windows=windows)] += STAGE_STEPS
            for way in ("encode", "decode"):
                pictures[way, stage] += 1 + STAGE_GUIDED
    return calls, pictures


def upsample_guidance(side: int, timesteps: Sequence[float], windows: bool = False) -> Calls:
    """A second evaluation, of the picture reduced to about the native side, in the first steps."""
    calls = plain(side, windows)
    if (factor := round(side / NATIVE)) > 1:
        guided = sum(t > (1 - ETA) * 1000 for t in timesteps)
        calls[Evaluation(side // factor, windows=windows)] += guided
    return calls


def methods(
    hooks: ModuleType, rules: ModuleType, sampling: Any, side: int
) -> dict[str, tuple[Calls, Pictures]]:
    """What a run takes by every method; `sampling` is ComfyUI's `model_sampling` of SDXL."""
    from comfy.samplers import calculate_sigmas

    once: Pictures = Counter({("decode", side): 1})
    levels = {name: calculate_sigmas(sampling, name, STEPS) for name in ("normal", "karras")}
    normal, karras = (sampling.timestep(sigmas[:-1]).tolist() for sigmas in levels.values())
    return {
        "plain SDXL": (plain(side), once),
        "HiDiffusion": (hidiffusion(hooks, rules, side, levels["normal"]), once),
        "Upsample Guidance": (upsample_guidance(side, normal), once),
        "the same, scheduler karras": (upsample_guidance(side, karras), once),
        "the same, window attention": (upsample_guidance(side, normal, True), once),
        "DiffuseHigh": diffusehigh(side),
        "its stages with window attention": diffusehigh(side, True),
    }


def build_vae() -> Any:
    """SDXL's VAE on the meta device."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with META:
        return AutoencoderKL(
            embed_dim=4,
            ddconfig={**VAE, "dropout": 0.0},
        ).requires_grad_(False)


def tables(result: dict) -> str:
    """The result in Markdown."""
    sides = list(result["sizes"])
    rows = list(result["sizes"].values())
    head = "".join(f" {side}×{side} |" for side in sides) + "\n|" + "---|" * (len(sides) + 1)

    def lines(kind: str, cell: Any) -> list[str]:
        return [
            f"| {name} |" + "".join(f" {cell(row[kind][name], row[kind])} |" for row in rows)
            for name in rows[0][kind]
        ]

    def of_a_run(cost: dict, costs: dict) -> str:
        ratio = cost["unet"] / costs["plain SDXL"]["unet"]
        return f"{cost['unet'] / 1e12:.0f} ({ratio:.2f}) + {cost['vae'] / 1e12:.0f}"

    return "\n".join(
        [
            "| one evaluation, TFLOP |" + head,
            *lines("evaluation", lambda flop, _: f"{flop / 1e12:.1f}"),
            "",
            f"| a run: UNet (of plain) + VAE, TFLOP |{head}",
            *lines("run", of_a_run),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("native_highres", __doc__, "comfyui")
    args = common.parse(parser, argv)
    hooks, rules = load_pack(args.comfyui, torch.device("cpu"))
    from comfy.model_sampling import ModelSamplingDiscrete
    from comfyui_version import __version__ as comfyui

    unet, cond = build_unet(FULL, torch.float16, META)
    vae = build_vae()

    @cache
    def unet_flop(call: Evaluation) -> int:
        return operations(evaluation(hooks, rules, unet, cond, call.side, call[1:]))

    @cache
    def vae_flop(way: str, side: int) -> int:
        channels, scale = (4, 8) if way == "decode" else (3, 1)
        x = torch.empty(1, channels, side // scale, side // scale, device=META)
        with torch.inference_mode():
            return operations(lambda: getattr(vae, way)(x))

    settings = {"steps": STEPS, "prompts": PROMPTS, "upsample_guidance_eta": ETA}
    settings |= {"stage_steps": STAGE_STEPS, "stage_guided": STAGE_GUIDED}
    result = common.header(args, device="meta", comfyui=comfyui, settings=settings, sizes={})
    for side in SIDES:
        evaluations = {
            "plain SDXL": Evaluation(side),
            "window attention": Evaluation(side, windows=True),
            "dilated, window attention": Evaluation(side, rad=True, windows=True),
            "pooled, window attention": Evaluation(side, pool=True, windows=True),
        }
        result["sizes"][side] = {
            "evaluation": {name: unet_flop(call) for name, call in evaluations.items()},
            "vae": {way: vae_flop(way, side) for way in ("encode", "decode")},
            "run": {
                name: {
                    "unet": PROMPTS * sum(n * unet_flop(call) for call, n in calls.items()),
                    "vae": sum(n * vae_flop(*picture) for picture, n in pictures.items()),
                    "evaluations": [call._asdict() | {"count": n} for call, n in calls.items()],
                }
                for name, (calls, pictures) in methods(
                    hooks, rules, ModelSamplingDiscrete(), side
                ).items()
            },
        }
        common.save(RESULTS / "native_highres.json", result)
    print(tables(result))


if __name__ == "__main__":
    main()
