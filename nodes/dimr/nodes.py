"""What DiMR is sampled with: classes, the authors' solver, and their other form of CFG."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import comfy.samplers
import torch
from comfy_api.latest import io

from ...infdit_core.dimr.classes import class_names, find_class
from ...infdit_core.dimr.config import NULL_CLASS
from ...infdit_core.dimr.sampling import (
    EVALUATIONS,
    STEPS,
    cfg_decay,
    finished,
    sigma_of,
    singlestep,
    time_of,
    uniform_sigmas,
)
from ...infdit_core.errors import InfDiTError
from ..common import named_errors, require, require_numbers
from .comfy_model import conditioning_of, require_dimr
from .loader import CATEGORY

_ALIASES = ["dimr", "imagenet", "class-conditional"]


class DiMRClass(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiMRClass",
            display_name="DiMR Class",
            category=CATEGORY,
            description="Says which of the 1000 classes of ImageNet a DiMR model draws. It takes"
            " the place of the text prompts.",
            inputs=[
                io.Combo.Input(
                    "class_name",
                    options=[f"{index} {name}" for index, name in enumerate(class_names())],
                    tooltip="Number and name of the class. Open the list and type a part of either"
                    " to search in it.",
                ),
                io.String.Input(
                    "classes",
                    default="",
                    multiline=True,
                    placeholder="several: 207, tiger shark",
                    optional=True,
                    tooltip="Several classes in place of the one above: numbers, names or parts of"
                    " names, separated by commas or lines. The pictures of a batch take turns."
                    " Number 1000 stands for no class. Left empty, the class above is drawn.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="class",
                    tooltip="For the sampler's positive.",
                ),
                io.Conditioning.Output(
                    display_name="no class",
                    tooltip="For the sampler's negative: what guidance leads away from.",
                ),
            ],
            search_aliases=[*_ALIASES, "prompt", "conditioning"],
        )

    @classmethod
    @named_errors("DiMR Class")
    def execute(cls, class_name: str, classes: str = "") -> io.NodeOutput:
        require(class_name, str, "expected class_name from the list")
        require(classes, str, "expected classes as text")
        asked = [part for part in re.split(r"[,\n]", classes) if part.strip()] or [class_name]
        chosen = tuple(find_class(part) for part in asked)
        return io.NodeOutput(conditioning_of(chosen), conditioning_of((NULL_CLASS,)))


class DiMRSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiMRSampler",
            display_name="DiMR Sampler",
            category=CATEGORY,
            description="The sampler and the noise levels that DiMR's authors draw with, for"
            " SamplerCustom at cfg 1.4. KSampler works as well.",
            inputs=[
                io.Int.Input(
                    "evaluations",
                    default=EVALUATIONS,
                    min=1,
                    max=STEPS,
                    tooltip="Evaluations of the network, twice as many with guidance. 250 is the"
                    " authors' number; 50 are a fifth of the time.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="Singlestep DPM-Solver++ of order 3; it takes other noise levels too."
                ),
                io.Sigmas.Output(
                    tooltip="Noise levels that are uniform in time. They end above 0, as the"
                    " authors have it."
                ),
            ],
            search_aliases=[*_ALIASES, "dpm-solver", "singlestep", "sigmas"],
        )

    @classmethod
    @named_errors("DiMR Sampler")
    def execute(cls, evaluations: int) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dimr), uniform_sigmas(evaluations))


@torch.no_grad()
def sample_dimr(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """`singlestep` as a sampler of k-diffusion; steps of the callback are evaluations."""
    levels = sigmas.tolist()
    if len(levels) < 2:
        return x
    if not (levels[-1] >= 0 and all(a > b for a, b in pairwise(levels))):
        raise InfDiTError(
            "DiMR Sampler: expected falling noise levels, each below the one before; got"
            f" {', '.join(f'{level:.4g}' for level in levels[:10])}{', ...' * (len(levels) > 10)}"
        )

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return model(x, x.new_full((len(x),), sigma), **(extra_args or {}))

    def report(done: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        if callback is not None:
            level = sigmas[done]
            callback({"x": x, "i": done, "sigma": level, "sigma_hat": level, "denoised": denoised})

    x = singlestep(denoise, x, sigmas, report)
    # Noise of any other level is for another sampler to go on with
    last = sigma_of(torch.tensor(1 / STEPS)).item()
    return finished(x, sigmas[-1]) if math.isclose(levels[-1], last, rel_tol=1e-4) else x


class DiMRCFGDecay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiMRCFGDecay",
            display_name="DiMR CFG decay",
            category=CATEGORY,
            description="Gives a DiMR model guidance that depends on time: none where sampling"
            " starts, and the whole scale where it ends.",
            inputs=[
                io.Model.Input("model", tooltip="From DiMR Loader. The model is not changed."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The cfg at the last noise level, in place of the sampler's cfg, which"
                    " is not read. 1 is no guidance.",
                ),
                io.Float.Input(
                    "exponent",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="More holds the guidance back longer. 0 is the whole scale at every"
                    " level.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with this guidance.")],
            search_aliases=[*_ALIASES, "cfg", "guidance"],
        )

    @classmethod
    @named_errors("DiMR CFG decay")
    def execute(cls, model, scale: float, exponent: float) -> io.NodeOutput:
        require_dimr(model)
        require_numbers(scale=scale, exponent=exponent)

        def guide(args: dict) -> torch.Tensor:
            """x - D of the guided D, as ComfyUI wants it."""
            t = time_of(args["sigma"].flatten()[:1]).item()
            cond, uncond = args["cond"], args["uncond"]
            return uncond + (cond - uncond) * cfg_decay(t, scale, exponent)

        model = model.clone()
        model.set_model_sampler_cfg_function(guide, disable_cfg1_optimization=True)
        return io.NodeOutput(model)
