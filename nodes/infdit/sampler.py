"""Upscaling: one node for all of it."""

from __future__ import annotations

import math
from itertools import pairwise

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ...infdit_core.edm import SIGMA_MIN
from ...infdit_core.errors import InfDiTError
from ...infdit_core.network.condition import Condition
from ...infdit_core.pictures.colour_fix import fix_colours
from ...infdit_core.pictures.prepare import pass_sizes
from ...infdit_core.sampling import PRESETS, SOLVERS, Step
from ..common import CATEGORY, Guidance, named_errors, require
from .comfy_model import PLAN, PROGRESS
from .inputs import (
    check_inputs,
    check_memory,
    colour_fix_input,
    conditioning_of,
    longest_edge_input,
    picture_output,
    picture_outputs,
    prepare_canvas,
    require_finite,
    target,
)
from .progress import SamplingProgress

_MAX_SEED = 2**64 - 1


class InfDiTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSampler",
            display_name="Inf-DiT Upscale",
            category=CATEGORY,
            description="Upscales pictures of any size with Inf-DiT, without tiles and seams.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Inf-DiT Checkpoint."),
                io.Image.Input("image", tooltip="The pictures to upscale, of any size."),
                Guidance.Input(
                    "guidance",
                    optional=True,
                    tooltip="From Inf-DiT CLIP Guidance. Left out, the CLIP tower of the model"
                    " file describes the picture, if the model was trained with one.",
                ),
                io.Float.Input(
                    "upscale_by",
                    default=4.0,
                    min=1.0,
                    max=8.0,
                    step=0.05,
                    tooltip="How many times wider and higher the result is. Above 4 the picture"
                    " goes through the model twice.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=_MAX_SEED,
                    control_after_generate=True,
                    tooltip="Chooses the invented detail. The same seed gives the same result"
                    " for a picture, wherever it stands in a batch.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="Steps of Heun's method, each of two evaluations but the last. 20 is"
                    " what the model's authors use; fewer are faster and less exact. Only the"
                    " preset exact reads it.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="exact",
                    optional=True,
                    tooltip="Exact is the authors' solver with the number of steps above. Fast"
                    " takes 12 evaluations of the network instead of 39, and with the bundled"
                    " model its error is smaller. Draft takes 6: for a first look.",
                ),
                longest_edge_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Fidelity: how much noise is put on the enlarged picture at the start."
                    " Less keeps closer to the picture that came in and takes as much fewer"
                    " evaluations. The useful range, measured with the bundled model, is 0.2 to"
                    " 0.6: below it is little but bicubic enlarging, above it nearly what 1 makes.",
                ),
                colour_fix_input(),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="A sampler of ComfyUI in place of the preset's, such as from"
                    " KSamplerSelect.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels in place of those of preset, steps and denoise: falling,"
                    " from 40 for a whole run, to 0.",
                ),
            ],
            outputs=picture_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["inf-dit", "infdit", "upscale", "super resolution", "4k", "8k"],
        )

    @classmethod
    @named_errors("Inf-DiT Upscale")
    def execute(
        cls,
        model,
        image: torch.Tensor,
        upscale_by: float,
        seed: int,
        steps: int,
        preset: str = "exact",
        guidance: torch.Tensor | None = None,
        longest_edge: int = 0,
        denoise: float = 1.0,
        colour_fix: str = "none",
        sampler: comfy.samplers.Sampler | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if sigmas is not None:
            _check_sigmas(sigmas)
        if math.isnan(denoise):  # which passes ComfyUI's check of the range
            raise InfDiTError(f"expected denoise in 0..1; got {denoise}")
        if sampler is not None:
            require(sampler, comfy.samplers.Sampler, "expected a SAMPLER")
        vectors = check_inputs(model, image, guidance)
        sizes = pass_sizes(
            (image.shape[1], image.shape[2]), target(image, upscale_by, longest_edge)
        )
        check_memory(model, sizes[-1], results=image.shape[0])
        chosen = PRESETS[preset]
        if preset == "exact":
            chosen = chosen._replace(steps=steps)
        if sigmas is None:
            sigmas = chosen.sigmas(denoise)
        steps = len(sigmas) - 1
        evaluations = steps if sampler else chosen._replace(steps=steps).evaluations
        runs = len(sizes) * image.shape[0]
        progress = SamplingProgress(
            evaluations * runs, steps * runs, cls.hidden.unique_id if cls.hidden else None
        )
        options = {PROGRESS: progress.cells, PLAN: progress.planned}

        results = []
        for i, picture in enumerate(image.split(1)):
            vector = None if vectors is None else vectors[i : i + 1]
            for size in sizes:
                canvas = prepare_canvas(model, picture, size)
                samples = canvas.concat
                if steps:
                    samples = _sample(
                        model,
                        canvas.condition(vector),
                        sampler or core_sampler(chosen.solver),
                        sigmas,
                        seed,
                        options,
                        progress.step,
                    )
                require_finite(samples)
                picture = canvas.finish(samples)
            results.append(fix_colours(picture, image[i : i + 1], colour_fix))
        return picture_output(torch.cat(results))


def core_sampler(solver: str) -> comfy.samplers.Sampler:
    """One of the engine's solvers as a SAMPLER of ComfyUI."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return model(x, x.new_full((x.shape[0],), sigma), **(extra_args or {}))

        def report(step: Step) -> None:
            if callback is not None:
                callback({"i": step.index, "x": step.x, "denoised": step.denoised})

        return SOLVERS[solver](denoise, x, sigmas.tolist(), report)

    return comfy.samplers.KSAMPLER(sample)


def _sample(
    model, condition: Condition, sampler, sigmas: torch.Tensor, seed: int, options: dict, callback
) -> torch.Tensor:
    """Sample with cfg 1 and more `transformer_options`, as SamplerCustomAdvanced does.

    The options go to the guider and not to a clone of the model: ComfyUI would load that anew.
    """
    concat, conditioning = conditioning_of(condition)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    options = model.model_options.get("transformer_options", {}) | options
    guider.model_options = model.model_options | {"transformer_options": options}
    noise = comfy.sample.prepare_noise(concat, seed)
    samples = guider.sample(
        noise, concat, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    return samples.to(comfy.model_management.intermediate_device())


def _check_sigmas(sigmas: torch.Tensor) -> None:
    """Refuse noise levels that make no picture."""
    require(sigmas, torch.Tensor, "expected SIGMAS")
    levels = sigmas.flatten().tolist()
    falling = all(b < a for a, b in pairwise(levels))  # False with NaN
    if sigmas.ndim != 1 or len(levels) < 2 or not (falling and math.isfinite(levels[0])):
        found = ", ".join(f"{level:.4g}" for level in levels[:8]) or "none"
        raise InfDiTError(
            f"expected sigmas that fall, at least two;"
            f" got {tuple(sigmas.shape)}: {found}{', ...' if len(levels) > 8 else ''}"
        )
    if not 0 <= levels[-1] <= SIGMA_MIN:
        raise InfDiTError(
            f"expected sigmas that end in 0, so that no noise is left; got {levels[-1]:.4g}"
            " at the end. Sampling in parts needs Inf-DiT Conditioning and Inf-DiT Decode."
        )
