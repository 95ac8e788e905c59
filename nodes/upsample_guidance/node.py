"""Upsample Guidance: SDXL and SD 1.5 beyond their native size, led by themselves at that size.

The node gives a model two wrappers. `Patch.sample` decides m for a run; `Patch.evaluate` calls the
model twice where the guidance is on. Nothing outlives a call, so there is nothing to undo.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy import latent_formats, model_base, model_sampling
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, copy_nested_dicts
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ..common import (
    LOW_BRANCH,
    UPSAMPLE_SCALE,
    named_errors,
    require_numbers,
    require_unet,
    unet_input,
)
from .rules import SCALES, Guided, Size, Window, auto_scale, divide_lengths

log = logging.getLogger(__name__)

KEY = "upsample_guidance"
"""Of our wrappers."""
NAME = "Upsample Guidance"
_AUTO, _SAME, _LOW = "auto", "same", "low"
_ALIASES = ["upsample guidance", "upscale guidance", "high resolution", "hires fix",
            "duplicated objects", "tuning-free"]  # fmt: skip


class UpsampleGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UpsampleGuidance",
            display_name=NAME,
            category="model/patch/unet",
            description="Lets SDXL, SD 1.5 and SD 2.x draw pictures of 2 to 4 times their native"
            " side in one pass: in the first, noisy steps the model also draws the picture at its"
            " native size, which leads the composition. Enlarge the result further with Inf-DiT"
            " Upscale.",
            inputs=[
                unet_input(),
                io.Combo.Input(
                    "scale",
                    options=[_AUTO, *(str(m) for m in SCALES)],
                    default=_AUTO,
                    tooltip="By how much the picture is smaller in the second evaluation of the"
                    " model, on each side. Auto brings it nearest to the native size and does"
                    " nothing at that size. Choose by hand for SDXL-Turbo and for samplers that"
                    " run tile by tile.",
                ),
                io.Float.Input(
                    "theta",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Strength. 1 takes the coarse part of the picture from the small one;"
                    " more overshoots, for more contrast in it; 0 switches the guidance off.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The part of the model's noise levels that is guided, from the noisiest"
                    " on. More holds the composition together longer and costs more; above 0.6"
                    " fine detail may get blocks.",
                ),
                io.Float.Input(
                    "ramp",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The part of the guided noise levels over which the strength falls to 0"
                    " at their end. 0 ends at once, as the authors do.",
                ),
                io.Combo.Input(
                    "low_size_cond",
                    options=[_SAME, _LOW],
                    default=_SAME,
                    advanced=True,
                    tooltip="SDXL only: the size that the small picture's evaluation is told. Same"
                    " tells that of the large picture, as the public code does; low divides it by"
                    " the scale.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance, for any sampler.")],
            search_aliases=_ALIASES,
        )

    @classmethod
    @named_errors(NAME)
    def execute(
        cls, model, scale: str, theta: float, eta: float, ramp: float, low_size_cond: str
    ) -> io.NodeOutput:
        require_numbers(theta=theta, eta=eta, ramp=ramp)
        patch = Patch(
            native=native_side(model),
            scale=None if scale == _AUTO else int(scale),
            window=Window(theta, eta, ramp),
            low_sizes=low_size_cond == _LOW,
        )
        require_noise(model.get_model_object("model_sampling"))
        model = model.clone()
        if model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
            log.warning("%s: the model has it already; this node wins over the other one.", NAME)
        wrap_outermost(model, WrappersMP.OUTER_SAMPLE, KEY, patch.sample)
        wrap_outermost(model, WrappersMP.APPLY_MODEL, KEY, patch.evaluate)
        return io.NodeOutput(model)


@dataclass(frozen=True)
class Patch:
    """The settings of a node, and the two wrappers that it adds to the model."""

    native: int
    """Side of the square that the model was trained at."""
    scale: int | None
    """None: by the size of the latent."""
    window: Window
    low_sizes: bool
    """Whether SDXL is told the small picture's size."""

    def scale_at(self, size: Size) -> int:
        """m for a latent of `size`; 1: no guidance."""
        return 1 if self.window.closed else self.scale or auto_scale(size, self.native)

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: m from the whole latent, for evaluations may see a part of it."""
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        with named_errors(NAME):
            require_noise(sampling)
            if noise.ndim != 4:
                raise InfDiTError(
                    "expected a latent of 4 dimensions (pictures, channels, height, width); got"
                    f" {tuple(noise.shape)}"
                )
        size = noise.shape[-2], noise.shape[-1]
        m = self.scale_at(size)
        options = guider.model_options.setdefault("transformer_options", {})
        options[UPSAMPLE_SCALE] = m
        if not self.window.closed:
            self._describe(size, m, self.weights(sampling, sigmas[:-1]))
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _describe(self, size: Size, m: int, weights: list[float]) -> None:
        h, w = Guided(size, m).low
        if m == 1:
            log.warning(
                "%s: the latent of %d×%d is near the model's native %d×%d, so there is nothing to"
                " guide. Draw a larger picture, or choose a scale.",
                *(NAME, size[1], size[0], self.native, self.native),
            )
            return
        if math.sqrt(h * w) < self.native / 2:
            log.warning(
                "%s: scale %d of a latent of %d×%d leaves %d×%d, less than half of the model's"
                " native %d×%d. Choose a smaller scale or auto.",
                *(NAME, m, size[1], size[0], w, h, self.native, self.native),
            )
        log.info(
            "%s (scale %d, latent %d×%d, low %d×%d): %d of %d steps are guided",
            *(NAME, m, size[1], size[0], w, h, sum(map(bool, weights)), len(weights)),
        )

    def evaluate(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """APPLY_MODEL: x0 of `x` (B, C, H, W) at noise levels `t` (B,)."""
        options = transformer_options or {}
        model = executor.class_obj
        size = x.shape[-2], x.shape[-1]
        guided = Guided(size, options.get(UPSAMPLE_SCALE) or self.scale_at(size))
        weights = self.weights(model.model_sampling, t) if guided.m > 1 else []

        # The low call comes first: what other patches remember of a call is then of the plain one.
        low = None
        if any(weights) and min(guided.low) > 0:
            low = executor(
                guided.mean(x),
                t / guided.m,  # not clamped: the timestep saturates by itself
                None if c_concat is None else guided.concat(c_concat, mask_channels(model)),
                c_crossattn,
                guided.control(control),
                low_options(options, guided.m),
                **self._low_conds(model, guided.m, kwargs),
            )
        high = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if low is None:
            return high
        return guided.guide(high, low, high.new_tensor(weights).view(-1, 1, 1, 1))

    def weights(self, sampling: Any, sigmas: torch.Tensor) -> list[float]:
        """w at noise levels (N,)."""
        return [self.window.weight(t) for t in timesteps(sampling, sigmas).tolist()]

    def _low_conds(self, model: Any, m: int, conds: dict[str, Any]) -> dict[str, Any]:
        for kind, told, lengths in ((model_base.SDXL, 6, 6), (model_base.SDXLRefiner, 5, 4)):
            if self.low_sizes and isinstance(model, kind) and conds.get("y") is not None:
                return conds | {"y": divide_lengths(conds["y"], told, lengths, m)}
        return conds


def low_options(options: dict[str, Any], m: int) -> dict[str, Any]:
    """transformer_options of the low call, with its noise level; `options` stays as it is."""
    low = copy_nested_dicts(options) | {LOW_BRANCH: True}
    if low.get("sigmas") is not None:
        low["sigmas"] = low["sigmas"] / m
    # EasyCache compares a call with the one before, which must be of the same size.
    low.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}).pop("easycache", None)
    return low


def mask_channels(model: Any) -> int:
    """How many of the channels beside the latent, from the first on, are masks."""
    return int(getattr(model, "concat_keys", ())[:1] == ("mask",))


def timesteps(sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """Training timesteps 0 to 999 (N,) of noise levels (N,).

    Models with continuous noise levels, such as EDM ones, have none: Stable Diffusion's stand in
    for them, at the same ratio of signal to noise.
    """
    counts = isinstance(sampling, model_sampling.ModelSamplingDiscrete)
    if counts and not isinstance(sampling, model_sampling.ModelSamplingDiscreteEDM):
        return sampling.timestep(sigmas)
    return model_sampling.ModelSamplingDiscrete().timestep(sigmas / sampling.sigma_data)


# ---- which models, and where their wrappers stand


def native_side(model: Any) -> int:
    """Side, in latent pixels, that the UNet in `model` was trained at; InfDiTError if it has none.

    Told from the latents' format: SDXL, with its distilled and pruned kinds, or SD 1.5 and SD 2.x.
    """
    unet, latents = require_unet(model), model.get_model_object("latent_format")
    if any(isinstance(layer, SpatialVideoTransformer) for layer in unet.modules()):
        kind = "whose UNet draws videos"
    elif isinstance(latents, latent_formats.SDXL | latent_formats.SDXL_Playground_2_5):
        return 128
    elif isinstance(latents, latent_formats.SD15):
        # SD 2.1 for 768 px is the one with v-prediction.
        return 96 if model.model.model_type == model_base.ModelType.V_PREDICTION else 64
    else:
        kind = f"whose latents are of the format {type(latents).__name__}"
    raise InfDiTError(
        "expected a model with the UNet of SDXL, SD 1.5 or SD 2.x; got"
        f" {type(model.model).__name__}, {kind}"
    )


def require_noise(sampling: Any) -> None:
    """InfDiTError unless noise is added to the picture: x = x0 + sigma * noise.

    So it is with predictions of noise, of v and of EDM, but not with flow models, where the
    picture fades as the noise grows.
    """
    schedules = (model_sampling.ModelSamplingDiscrete, model_sampling.ModelSamplingContinuousEDM)
    added = isinstance(sampling, model_sampling.EPS) and isinstance(sampling, schedules)
    if not added or isinstance(sampling, model_sampling.IMG_TO_IMG):
        got = " and ".join(base.__name__ for base in type(sampling).__bases__)
        raise InfDiTError(
            f"expected a model that predicts noise, v or EDM's target; got one with {got}"
        )


def wrap_outermost(model: ModelPatcher, kind: str, key: str, wrapper: Callable) -> None:
    """Give `model` a wrapper around all others of its kind that it has, and replace that of `key`.

    ComfyUI runs wrappers in the order of their keys, the first one outermost.
    """
    model.remove_wrappers_with_key(kind, key)
    others = model.wrappers.pop(kind, {})
    model.add_wrapper_with_key(kind, key, wrapper)
    model.wrappers[kind].update(others)
