"""The low band of a picture for whatever a sampler draws, by hooks that ComfyUI offers.

`guided` gives a clone of a model a wrapper, which prepares the `Run` as sampling begins and puts it
into the run's own transformer_options, and a post-CFG function that reads it there. No module is
changed and nothing outlives the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...infdit_core.errors import InfDiTError
from ..common import named_errors, require_numbers, step_index
from .rules import (
    Size,
    blur_sigma,
    enlarge,
    low_band,
    most_levels,
    sharpen,
    strengths,
    swap_low_band,
)
from .vae import CELL, Codec, load_again

log = logging.getLogger(__name__)

KEY = "diffusehigh"
"""Of our wrapper, and of the `Run` in transformer_options."""


@dataclass(frozen=True)
class Settings:
    """What both nodes let the user choose about the guidance."""

    guided_steps: int
    strength: float
    fade: float
    in_latents: bool
    """Swap the low band of latents, without the VAE; otherwise that of pictures, as the authors."""
    alpha: float
    kernel: int
    sigma_min: float
    sigma_max: float
    wavelet: str
    levels: int
    seed: int

    def __post_init__(self) -> None:
        require_numbers(
            strength=self.strength,
            fade=self.fade,
            sharpen_alpha=self.alpha,
            sharpen_sigma_min=self.sigma_min,
            sharpen_sigma_max=self.sigma_max,
        )

    def target(self, picture: torch.Tensor, size: Size, stage: int = 0) -> torch.Tensor:
        """`picture` (B, 3, H, W) enlarged to `size` and sharpened: what guides the sampler."""
        sigma = blur_sigma(self.seed, stage, self.sigma_min, self.sigma_max)
        return sharpen(enlarge(picture, size), self.alpha, self.kernel, sigma)

    def check(self, size: Size) -> None:
        """InfDiTError unless the settings fit each other and a picture of `size` px."""
        where = f"for a picture of {size[1]}x{size[0]} px"
        if self.kernel % 2 == 0 or self.kernel // 2 >= min(size):
            raise InfDiTError(
                f"expected an odd sharpen_kernel below {2 * min(size)} {where}; got {self.kernel}"
            )
        if not 0 < self.sigma_min <= self.sigma_max:
            raise InfDiTError(
                "expected sharpen_sigma_min above 0 and not above sharpen_sigma_max; got"
                f" {self.sigma_min:g} and {self.sigma_max:g}"
            )
        h, w = (n // CELL for n in size) if self.in_latents else size
        if self.guided_steps and self.levels > (most := most_levels((h, w), self.wavelet)):
            raise InfDiTError(
                f"expected at most {most} levels of {self.wavelet} {where}"
                f"{' with guidance in latents' * self.in_latents}, since each needs a filter length"
                f" of pixels; got {self.levels}"
            )


@dataclass(frozen=True)
class Run:
    """What the post-CFG function needs to know of one sampling run."""

    settings: Settings
    codec: Codec
    low: torch.Tensor
    """The band to guide towards: of a picture, or of a latent in the model's scale."""
    guider: Any
    shape: torch.Size

    def guide(self, denoised: torch.Tensor, sigma: float, sigmas: list[float]) -> torch.Tensor:
        """The prediction x0 (B, 4, h, w) in the model's scale with the low band of the target."""
        step, own = step_index(sigma, sigmas), self.settings
        plan = strengths(own.guided_steps, own.strength, own.fade)
        if step >= len(plan) or plan[step] == 0:
            return denoised
        band = own.wavelet, own.levels, plan[step]
        if own.in_latents:
            return swap_low_band(denoised, self.low.to(denoised), *band)
        model = self.guider.model_patcher.model
        picture = self.codec.decode(model.process_latent_out(denoised))
        latent = self.codec.encode(swap_low_band(picture, self.low.to(picture), *band))
        load_again(self.guider, self.shape)
        return model.process_latent_in(latent.to(denoised))


@dataclass(frozen=True)
class Guidance:
    """The settings of a node with its VAE and its picture."""

    node: str
    """Display name, for errors."""
    settings: Settings
    codec: Codec
    target: Callable[[Size], torch.Tensor]
    """The picture (B, 3, H, W) to guide towards, for a size in pixels."""

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: prepare the run before the model is loaded."""
        guider = executor.class_obj
        with named_errors(self.node):
            low = self.low(noise, guider.model_patcher.model)
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = Run(self.settings, self.codec, low, guider, noise.shape)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def low(self, noise: torch.Tensor, model: Any) -> torch.Tensor:
        """The low band of the target for a latent like `noise`."""
        if noise.ndim != 4:
            raise InfDiTError(
                f"expected a latent of pictures, with 4 dimensions; got one with {noise.ndim}"
            )
        size = noise.shape[-2] * CELL, noise.shape[-1] * CELL
        self.settings.check(size)
        target = self.target(size).float()
        if target.shape[0] not in (1, noise.shape[0]):
            raise InfDiTError(
                f"expected one picture or as many as the latent has, {noise.shape[0]}; got"
                f" {target.shape[0]}"
            )
        if self.settings.in_latents:
            target = model.process_latent_in(self.codec.encode(target))
        return low_band(target, self.settings.wavelet, self.settings.levels)


def guided(model: Any, guidance: Guidance) -> Any:
    """A clone of the MODEL `model` with this guidance, in place of an earlier one."""
    model = model.clone()
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        log.warning(
            "%s: the model has DiffuseHigh Guidance already; this node wins over it.", guidance.node
        )
        model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, guidance.sample)
    if _post_cfg not in model.model_options.get("sampler_post_cfg_function", []):
        model.set_model_sampler_post_cfg_function(_post_cfg)
    return model


def _post_cfg(args: dict[str, Any]) -> torch.Tensor:
    options = args["model_options"].get("transformer_options", {})
    run, sigmas = options.get(KEY), options.get("sample_sigmas")
    if run is None or sigmas is None:
        return args["denoised"]
    return run.guide(args["denoised"], float(args["sigma"].max()), sigmas.tolist())
