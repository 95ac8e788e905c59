"""The parts of upscaling, for those who sample with ComfyUI's own sampler nodes."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ...infdit_core.memory.host import require_memory
from ...infdit_core.pictures.alpha import fill_invisible
from ...infdit_core.pictures.colour_fix import fix_colours
from ...infdit_core.pictures.mask import check_mask, lay_mask
from ...infdit_core.pictures.prepare import Canvas
from ...infdit_core.pictures.start import check_start
from ...infdit_core.pictures.wrap import check_wrap, lay_out
from ..common import CATEGORY, CanvasType, named_errors, require
from .comfy_model import conditioning_of, size_of, with_prior
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
                start_image_input("The sampler's denoise"),
                wrap_input(),
                mask_input("Black takes as much time as white."),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Connect to positive and to negative, and set cfg to 1.",
                ),
                io.Latent.Output(
                    tooltip="Where sampling starts: the picture at its new size, or start_image,"
                    " with the mask if there is one; connect to latent_image."
                ),
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
        start_image: torch.Tensor | None = None,
        wrap: str = "none",
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        vectors = check_inputs(model, image, guidance)
        warn_of_patches(model)
        source, batch = (image.shape[1], image.shape[2]), len(image)
        box = height, width
        size = result_size(source, upscale_by, longest_edge, size_by, megapixels, box)
        check_wrap(wrap)
        if start_image is not None:
            require(start_image, torch.Tensor, "start_image: expected an IMAGE")
            check_start(start_image, batch, size)
        if mask is not None:
            mask = check_mask(require(mask, torch.Tensor, "mask: expected a MASK"), batch, size)
        require_memory(size, model.load_device, at_once=batch)
        block_px = model.model.infdit_config.block_px
        canvas = with_prior(model, lay_out(fill_invisible(image, wrap), size, block_px, wrap))
        if start_image is not None:
            start = lay_out(fill_invisible(start_image, wrap), size, block_px, wrap).concat
            canvas.start = start.expand(batch, -1, -1, -1)
        latent: dict = {"samples": canvas.first}
        if same_noise:
            latent["batch_index"] = [0] * batch  # core draws noise by these
        if mask is not None:
            latent["noise_mask"] = canvas.mask = lay_mask(mask, canvas)
        return io.NodeOutput(
            conditioning_of(canvas.condition(vectors), canvas.wrap), latent, canvas
        )


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
        check_wrap("both" if canvas.wrap else "none", colour_fix)
        picture = canvas.finish(x)
        fixed = fix_colours(picture, canvas.source, colour_fix)
        if canvas.mask is not None and colour_fix != "none":
            weight = canvas.crop(canvas.mask).movedim(1, -1)
            fixed = torch.lerp(picture, fixed, weight.to(picture).expand_as(picture))
        return picture_output(fixed)


def _describe(x: torch.Tensor) -> str:
    """The size of a latent for people."""
    if x.ndim != 4:
        return f"shape {tuple(x.shape)}"
    return f"{len(x)} of {size_of(x)} and {x.shape[1]} channels"
