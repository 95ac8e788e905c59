"""HiDiffusion: SDXL and SD 1.5 beyond their native size. The node, and which models it takes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ..common import HIDIFFUSION, named_errors, require_numbers, require_unet, unet_input
from .hooks import Mode, Patch
from .rules import SD15, SDXL, SDXL_TURBO, Family, Ratios

log = logging.getLogger(__name__)

_ALIASES = ["hidiffusion", "rau-net", "raunet", "msw-msa", "high resolution",
            "deep shrink", "hires fix", "duplicated objects"]  # fmt: skip
_AUTO, _CUSTOM = "auto", "custom"
_STEPS, _SIGMA = "sampler steps", "sigma percent"
_PRESETS = {family.name: family for family in (SDXL, SDXL_TURBO, SD15)}


class HiDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HiDiffusion",
            display_name="HiDiffusion",
            category="model/patch/unet",
            description="Lets SDXL, SD 1.5 and SD 2.x draw pictures of about twice their native"
            " side in one pass, without doubled objects and faster than the plain model. Enlarge"
            " the result further with Inf-DiT Upscale.",
            inputs=[
                unet_input(),
                io.Combo.Input(
                    "preset",
                    options=[_AUTO, *_PRESETS, _CUSTOM],
                    default=_AUTO,
                    tooltip="Whose steps to use. Auto finds SDXL or SD1.5/2.x from the model and"
                    " takes the authors' values. SDXL-Turbo cannot be told from SDXL: choose it by"
                    " hand. Custom takes t1, t2 and aggressive_ratio from below.",
                ),
                io.Combo.Input(
                    "rau_net",
                    options=[mode.value for mode in Mode],
                    default=Mode.AUTO.value,
                    advanced=True,
                    tooltip="How features are shrunk in the first steps so that the composition"
                    " stays whole. Auto does as the authors and leaves pictures of native size"
                    " alone; normal and aggressive act at every size. Aggressive holds objects"
                    " together more and is for SDXL only: other models then use normal. Off suits"
                    " image-to-image below a denoise of 0.6.",
                ),
                io.Boolean.Input(
                    "window_attention",
                    default=True,
                    tooltip="Self-attention at the highest resolutions works in four shifted"
                    " windows, in every step. Faster, most on SD1.5; switch it off if fine detail"
                    " does not hold together.",
                ),
                io.Float.Input(
                    "t1",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Custom preset only: the part of the steps, 0 to 1, until which SDXL's"
                    " features are pooled, or SD1.5's first down-sampler is dilated. More gives"
                    " fewer doubled objects and softer detail.",
                ),
                io.Float.Input(
                    "t2",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Custom preset only: the part of the steps, 0 to 1, until which the"
                    " second shrinking is on as well, for pictures of four times the native side;"
                    " the authors use 0.3 there. SDXL uses it in normal mode only.",
                ),
                io.Float.Input(
                    "aggressive_ratio",
                    default=0.16,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Custom preset with aggressive RAU-Net on SDXL only: the part of the"
                    " steps, 0 to 1, in which the down-sampler is dilated before pooling takes over"
                    " until t1.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Chooses how the attention windows are shifted. It is independent of"
                    " the sampler's seed: the noise stays the same.",
                ),
                io.Combo.Input(
                    "timing",
                    options=[_STEPS, _SIGMA],
                    default=_STEPS,
                    advanced=True,
                    tooltip="What t1, t2 and aggressive_ratio are parts of. Sampler steps is the"
                    " authors' way; sampling that is split over several nodes is timed by noise"
                    " level all the same. Sigma percent counts along the model's noise levels, as"
                    " start_percent of other nodes does, whatever the scheduler.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with HiDiffusion, for any sampler. Samplers that add noise,"
                    " such as euler_ancestral, give the best pictures."
                )
            ],
            search_aliases=_ALIASES,
        )

    @classmethod
    @named_errors("HiDiffusion")
    def execute(
        cls,
        model,
        preset: str,
        rau_net: str,
        window_attention: bool,
        t1: float,
        t2: float,
        aggressive_ratio: float,
        seed: int,
        timing: str,
    ) -> io.NodeOutput:
        require_numbers(t1=t1, t2=t2, aggressive_ratio=aggressive_ratio)
        patch = Patch(
            family=_family(model, preset),
            rau_net=Mode(rau_net),
            window_attention=window_attention,
            ratios=Ratios(t1, t2, aggressive_ratio) if preset == _CUSTOM else None,
            seed=seed,
            by_sigma=timing == _SIGMA,
            gentle=_is_gentle(model),
        )
        model = model.clone()
        if model.get_wrappers(WrappersMP.APPLY_MODEL, HIDIFFUSION):
            log.warning("HiDiffusion: the model has HiDiffusion already; this node wins over it.")
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, patch.sample),
            (WrappersMP.APPLY_MODEL, patch.evaluate),
        ):
            model.remove_wrappers_with_key(kind, HIDIFFUSION)
            model.add_wrapper_with_key(kind, HIDIFFUSION, wrapper)
        return io.NodeOutput(model)


def _family(model: Any, preset: str) -> Family:
    """The kind of UNet that `model` is, by its blocks; InfDiTError if it is none of ours."""
    layout = _layout(require_unet(model))
    name = type(model.model).__name__
    found = next((family for family in (SDXL, SD15) if family.layout == layout), None)
    if found is None:
        raise InfDiTError(
            f"expected the blocks of SDXL ({SDXL.layout}) or of SD 1.5 and SD 2.x"
            f" ({SD15.layout}); got {name} with the blocks {layout}"
        )
    chosen = _PRESETS.get(preset, found)
    if chosen.layout != layout:
        raise InfDiTError(
            f"expected an {chosen.name} model for the preset {preset}; got the blocks"
            f" of {found.name}. The preset auto finds the right one."
        )
    # SD 2.1 for 768 px is the one with v-prediction.
    v_prediction = model.model.model_type == ModelType.V_PREDICTION
    return replace(chosen, native=96) if chosen is SD15 and v_prediction else chosen


def _is_gentle(model: Any) -> bool:
    """Whether it is an in-painting model, or Playground 2.5: the one SDXL with EDM noise levels."""
    inpainting = model.get_model_object("diffusion_model").in_channels == 9
    return inpainting or model.model.model_type == ModelType.EDM


def _layout(unet: UNetModel) -> str:
    """The blocks in the letters of `Family.layout`; "?" is a layer HiDiffusion does not know."""

    def letter(block: Any) -> str:
        kinds = [type(layer) for layer in block or ()]
        if any(issubclass(kind, SpatialVideoTransformer) for kind in kinds):
            return "?"
        attention = any(issubclass(kind, SpatialTransformer) for kind in kinds)
        if any(issubclass(kind, Upsample) for kind in kinds):
            return "A" if attention else "R"
        if any(issubclass(kind, Downsample) for kind in kinds):
            return "D"
        return "a" if attention else "r"

    groups = (unet.input_blocks, [unet.middle_block], unet.output_blocks)
    return "/".join("".join(letter(block) for block in group) for group in groups)
