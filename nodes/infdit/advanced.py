"""The parts of upscaling, for those who sample with ComfyUI's own sampler nodes."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ...infdit_core.memory.host import require_memory
from ...infdit_core.pictures.colour_fix import fix_colours
from ...infdit_core.pictures.prepare import Canvas, prepare
from ..common import CATEGORY, CanvasType, named_errors, require
from .comfy_model import conditioning_of, size_of, with_prior
from .inputs import (
    check_inputs,
    colour_fix_input,
    longest_edge_input,
    picture_inputs,
    picture_output,
    picture_outputs,
    result_size,
    same_noise_input,
    size_inputs,
)
from .patches import warn_of_patches


class InfDiTConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTConditioning",
            display_name="Inf-DiT Conditioning",
            category=CATEGORY,
            description="Prepares pictures for upscaling with KSampler or SamplerCustomAdvanced:"
            " sampler heun, scheduler karras, 20 steps, cfg 1 is what Inf-DiT Upscale does.",
            inputs=[
                *picture_inputs("The model was trained for 4; chain two samplings for more."),
                longest_edge_input(),
                *size_inputs(),
                same_noise_input(False, "Off, ComfyUI's samplers give each picture its own noise."),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Connect to positive and to negative, and set cfg to 1.",
                ),
                io.Latent.Output(tooltip="Where sampling starts; connect to latent_image."),
                CanvasType.Output(
                    display_name="INFDIT_CANVAS",
                    tooltip="Connect to Inf-DiT Decode, which needs the size and the alpha.",
                ),
            ],
            search_aliases=["inf-dit", "infdit", "ksampler", "advanced"],
        )

    @classmethod
    @named_errors("Inf-DiT Conditioning")
    def execute(
        cls,
        model,
        image: torch.Tensor,
        upscale_by: float,
        guidance: torch.Tensor | None = None,
        longest_edge: int = 0,
        size_by: str = "factor or longest edge",
        megapixels: float = 4.0,
        width: int = 2048,
        height: int = 2048,
        same_noise: bool = False,
    ) -> io.NodeOutput:
        vectors = check_inputs(model, image, guidance)
        warn_of_patches(model)
        box = height, width
        size = result_size(image, upscale_by, longest_edge, size_by, megapixels, box)
        require_memory(size, model.load_device, at_once=image.shape[0])
        canvas = prepare(image, size=size, block_px=model.model.infdit_config.block_px)
        canvas = with_prior(model, canvas)
        concat, conditioning = conditioning_of(canvas.condition(vectors))
        latent: dict = {"samples": concat}
        if same_noise:
            latent["batch_index"] = [0] * len(concat)  # core draws noise by these
        return io.NodeOutput(conditioning, latent, canvas)


class InfDiTDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTDecode",
            display_name="Inf-DiT Decode",
            category=CATEGORY,
            description="Turns what a sampler made of Inf-DiT Conditioning into pictures.",
            inputs=[
                io.Latent.Input("samples", tooltip="The sampler's result."),
                CanvasType.Input("canvas", tooltip="From the same Inf-DiT Conditioning node."),
                colour_fix_input(),
            ],
            outputs=picture_outputs(),
            search_aliases=["inf-dit", "infdit", "vae decode"],
        )

    @classmethod
    @named_errors("Inf-DiT Decode")
    def execute(cls, samples: dict, canvas: Canvas, colour_fix: str = "none") -> io.NodeOutput:
        require(canvas, Canvas, "expected canvas from Inf-DiT Conditioning")
        latent = samples.get("samples") if isinstance(samples, dict) else samples
        x = require(latent, torch.Tensor, "expected samples from a sampler")
        expected = tuple(canvas.concat.shape)
        needs_batch = canvas.alpha is not None or colour_fix != "none"
        if x.shape[1:] != expected[1:] or (needs_batch and len(x) != expected[0]):
            raise InfDiTError(
                f"expected the LATENT of the sampler that this canvas's Inf-DiT Conditioning went"
                f" to, {_describe(canvas.concat)}; got {_describe(x)}"
            )
        picture = canvas.finish(x)
        if colour_fix != "none":
            picture = fix_colours(picture, canvas.source, colour_fix)
        return picture_output(picture)


def _describe(x: torch.Tensor) -> str:
    """The size of a latent for people."""
    if x.ndim != 4:
        return f"shape {tuple(x.shape)}"
    return f"{len(x)} of {size_of(x)} and {x.shape[1]} channels"
