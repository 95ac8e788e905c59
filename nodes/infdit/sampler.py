"""Upscaling: one node for all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ...infdit_core.edm import SIGMA_MIN
from ...infdit_core.errors import InfDiTError
from ...infdit_core.pictures.prepare import Canvas, check_image, pass_sizes
from ...infdit_core.sampling import AUTO, PRESETS, SOLVERS, Step, check_sigmas, find_preset
from ...infdit_core.upscale import upscale
from ..common import CATEGORY, named_errors, require
from .comfy_model import PROGRESS, conditioning_of, require_infdit, with_prior
from .inputs import (
    check_inputs,
    colour_fix_input,
    longest_edge_input,
    mask_input,
    picture_inputs,
    picture_output,
    picture_outputs,
    result_size,
    same_noise_input,
    size_inputs,
    start_image_input,
    wrap_input,
)
from .patches import warn_of_patches
from .progress import SamplingProgress, shows_progress

MAX_SEED = 2**64 - 1


class InfDiTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSampler",
            display_name="Inf-DiT Upscale",
            category=CATEGORY,
            description="Upscales pictures of any size with Inf-DiT, without tiles and seams.",
            inputs=[
                *picture_inputs("Above 4 the picture goes through the model twice."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Chooses the invented detail. The same seed gives the same result"
                    " for a picture, wherever it stands in a batch.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=200,
                    advanced=True,
                    tooltip="Steps of Heun's method, each of two evaluations but the last. 20 is"
                    " what the model's authors use; fewer are faster and less exact. Read by the"
                    " preset exact, and by auto where the model's file asks for nothing.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, AUTO],
                    default=AUTO,
                    optional=True,
                    tooltip="Auto takes what the model's file asks for: two evaluations of the"
                    " network with the small model of this pack, exact where a file asks for"
                    " nothing. Exact is the authors' solver: 39 evaluations for 20 steps. Fast"
                    " takes 12. Draft takes 6, for a first look.",
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
                    " Less keeps closer to the input picture and takes fewer evaluations, except"
                    " with auto. At 0 nothing is invented: the small model of this pack gives the"
                    " picture sharpened, others give bicubic enlarging.",
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
                    tooltip="Noise levels instead of preset, steps and denoise: they fall to 0,"
                    " from 40 for a whole run, from 0.5 with the small model of this pack.",
                ),
                start_image_input("denoise"),
                wrap_input(),
                *size_inputs(),
                same_noise_input(True, "Off, the seed grows by 1 from picture to picture."),
                mask_input("Black below and right of all white takes no time."),
            ],
            outputs=picture_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["inf-dit", "infdit", "upscale", "super resolution", "4k", "8k"],
        )

    @classmethod
    @named_errors("Inf-DiT Upscale")
    @shows_progress
    def execute(
        cls,
        model,
        image: torch.Tensor,
        upscale_by: float,
        seed: int,
        steps: int,
        preset: str = AUTO,
        guidance: torch.Tensor | None = None,
        longest_edge: int = 0,
        denoise: float = 1.0,
        colour_fix: str = "none",
        sampler: comfy.samplers.Sampler | None = None,
        sigmas: torch.Tensor | None = None,
        start_image: torch.Tensor | None = None,
        wrap: str = "none",
        mask: torch.Tensor | None = None,
        size_by: str = "factor or longest edge",
        megapixels: float = 4.0,
        width: int = 2048,
        height: int = 2048,
        same_noise: bool = True,
        *,
        progress: SamplingProgress,
    ) -> io.NodeOutput:
        if sigmas is not None:
            _check_sigmas(sigmas)
        if math.isnan(denoise):  # which passes ComfyUI's check of the range
            raise InfDiTError(f"expected denoise in 0..1; got {denoise}")
        if sampler is not None:
            require(sampler, comfy.samplers.Sampler, "expected a SAMPLER")
        if start_image is not None:
            require(start_image, torch.Tensor, "start_image: expected an IMAGE")
        if mask is not None:
            require(mask, torch.Tensor, "mask: expected a MASK")
        check_image(require(image, torch.Tensor, "expected an IMAGE"))
        require_infdit(model)
        source, box = (image.shape[1], image.shape[2]), (height, width)
        size = result_size(source, upscale_by, longest_edge, size_by, megapixels, box)
        chosen = find_preset(preset, model.model.infdit.metadata)
        if chosen == PRESETS["exact"]:  # auto is exact where the file asks for nothing
            chosen = chosen._replace(steps=steps)
        if sigmas is None:
            sigmas = chosen.sigmas(denoise, model.model.infdit_config.sigma_max)
        steps = len(sigmas) - 1
        evaluations = steps if sampler else chosen._replace(steps=steps).evaluations
        name = _name(sampler) if sampler else chosen.solver
        sizes = pass_sizes(source, size)
        progress.start(image, sizes, steps, evaluations, name, model.load_device)
        for name in warn_of_patches(model):
            progress.note(f"{name} has no effect")
        vectors = check_inputs(model, image, guidance)
        sampler = sampler or core_sampler(chosen.solver)
        draw = GuiderDraw(model, sampler, sigmas, seed, progress, chosen.consistency)
        if not same_noise:
            draw.passes_of_a_seed = len(sizes)
        result = upscale(
            image,
            size,
            draw,
            vectors=vectors,
            colour_fix=colour_fix,
            start=start_image,
            wrap=wrap,
            mask=mask,
        )
        return picture_output(result)


class Report(Protocol):
    """What is told of a run, as `SamplingProgress` shows it."""

    def begin(self, canvas: Canvas) -> None: ...

    def cells(self, done: int, total: int) -> None: ...

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None: ...


@dataclass
class GuiderDraw:
    """Draws with a SAMPLER of ComfyUI and cfg 1, as SamplerCustomAdvanced does."""

    model: Any
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor
    seed: int
    progress: Report
    consistency: int = 0
    """Back-projections of the result."""
    passes_of_a_seed: int | None = None
    """After how many passes, those of a picture, the seed grows by one; None: never."""
    _passes: int = field(default=0, init=False)

    @property
    def block_px(self) -> int:
        return self.model.model.infdit_config.block_px

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    def prepare(self, canvas: Canvas) -> Canvas:
        """The canvas with the picture of the model's prior, if it has one."""
        return with_prior(self.model, canvas)

    def __call__(self, canvas: Canvas) -> torch.Tensor:
        """A sampled (B, 3, H, W)."""
        self.progress.begin(canvas)
        conditioning = conditioning_of(canvas.condition(), canvas.wrap)
        first = canvas.first
        seed = self.seed + (self._passes // self.passes_of_a_seed if self.passes_of_a_seed else 0)
        seed, self._passes = seed % (MAX_SEED + 1), self._passes + 1

        def noise(shape: tuple[int, ...]) -> torch.Tensor:
            return comfy.sample.prepare_noise(first.new_empty(shape), seed)

        if len(self.sigmas) < 2:
            return first
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(conditioning, conditioning)
        guider.set_cfg(1.0)
        # The options go to the guider and not to a clone of the model: ComfyUI would load that anew
        options = {PROGRESS: self.progress.cells}
        options = self.model.model_options.get("transformer_options", {}) | options
        guider.model_options = self.model.model_options | {"transformer_options": options}
        samples = guider.sample(
            canvas.noise(noise),
            first,
            self.sampler,
            self.sigmas,
            denoise_mask=canvas.mask,
            callback=self.progress.step,
            disable_pbar=True,
            seed=seed,
        )
        return samples.to(comfy.model_management.intermediate_device())


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


def _name(sampler: comfy.samplers.Sampler) -> str:
    """What KSamplerSelect calls a sampler, such as "dpmpp_2m"."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__)
    return name.removeprefix("sample_").removesuffix("_function")


def _check_sigmas(sigmas: torch.Tensor) -> None:
    """Refuse noise levels that make no picture."""
    levels = check_sigmas(require(sigmas, torch.Tensor, "expected SIGMAS"))
    if levels[-1] > SIGMA_MIN:
        raise InfDiTError(
            f"expected sigmas that end in 0, so that no noise is left; got {levels[-1]:.4g}"
            " at the end. Sampling in parts needs Inf-DiT Conditioning and Inf-DiT Decode."
        )
