"""DiffuseHigh: a picture drawn again at rising sizes, guided by its own low band. The nodes."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ..common import (
    HIDIFFUSION,
    RAU_NET_OFF,
    named_errors,
    require,
    require_numbers,
    require_unet,
    unet_input,
)
from .guidance import Guidance, Settings, guided
from .inputs import LATENT, MAX_SEED, TILES, guidance_inputs, guided_steps_input, tile_input
from .rules import Size, stage_sizes
from .vae import CELL, Codec

log = logging.getLogger(__name__)

_ALIASES = ["diffusehigh", "diffuse high", "high resolution", "hires fix", "progressive upscale",
            "wavelet", "dwt"]  # fmt: skip
_BASE, _TARGET = "base", "target"
_SIZE_KEYS = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")
"""SDXL's size conditioning, in CONDITIONING."""


class DiffuseHighGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffuseHighGuidance",
            display_name="DiffuseHigh Guidance",
            category="model/patch/unet",
            description="Makes any sampler keep the large forms of a picture in its first steps,"
            " while it draws detail of its own: for image to image at a larger size.",
            inputs=[
                unet_input(),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The picture whose forms are kept. It is enlarged to the size of the"
                    " latent that is sampled.",
                ),
                guided_steps_input(),
                *guidance_inputs(),
                tile_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Chooses the sharpening's blur. It is independent of the sampler's"
                    " seed.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance, for any sampler.")],
            search_aliases=_ALIASES,
        )

    @classmethod
    @named_errors("DiffuseHigh Guidance")
    def execute(
        cls, model, vae, image, guided_steps: int, strength: float, fade: float, guidance: str,
        sharpen_alpha: float, sharpen_kernel: int, sharpen_sigma_min: float,
        sharpen_sigma_max: float, wavelet: str, levels: int, tile: str, seed: int,
    ) -> io.NodeOutput:  # fmt: skip
        _check_model(model, vae)
        picture = _picture(image)
        settings = Settings(
            guided_steps, strength, fade, guidance == LATENT, sharpen_alpha, sharpen_kernel,
            sharpen_sigma_min, sharpen_sigma_max, wavelet, levels, seed,
        )  # fmt: skip

        def target(size: Size) -> torch.Tensor:
            return settings.target(picture, size)

        codec = Codec(vae, TILES[tile])
        node = "DiffuseHigh Guidance"
        return io.NodeOutput(guided(model, Guidance(node, settings, codec, target)))


class DiffuseHigh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffuseHigh",
            display_name="DiffuseHigh",
            category="sampling",
            description="Draws a picture of SDXL or SD 1.5 again at rising sizes, up to about twice"
            " its side, with new detail and its own large forms. Enlarge the result further with"
            " Inf-DiT Upscale.",
            inputs=[
                unet_input(),
                io.Conditioning.Input("positive", tooltip="The prompt, the same for all sizes."),
                io.Conditioning.Input("negative", tooltip="What to keep away from."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The picture to begin with, best of the model's native size, such as"
                    " what SDXL drew at 1024 px. Alpha is dropped.",
                ),
                io.String.Input(
                    "scales",
                    default="1.5, 2.0",
                    tooltip="The sizes to draw, one after another: factors of the picture's sides,"
                    " above 1 and up to 4, or width and height such as 1536x1024. The last one is"
                    " the result's.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Steps of the whole schedule, of which only the last ones are run.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=15,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="How many of the schedule's last steps are run for each size. More put"
                    " more noise on the picture, and change it more.",
                ),
                io.Float.Input(
                    "cfg",
                    default=10.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the prompt is followed. 10 is the authors' number, and"
                    " high only because the noise is low. Take the model's own for distilled"
                    " models, such as 1 for LCM and Lightning.",
                ),
                guided_steps_input(),
                *guidance_inputs(),
                io.Combo.Input(
                    "size_cond",
                    options=[_BASE, _TARGET],
                    default=_BASE,
                    advanced=True,
                    tooltip="SDXL only: the size that the model is told. Base is that of the"
                    " incoming picture, as the authors do; target that of each result. A prompt"
                    " that names its own size keeps it.",
                ),
                tile_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Chooses the noise and the sharpening's blur. Every further size takes"
                    " the next number.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels for every size, in place of steps and last_steps. The"
                    " authors' fall from 0.78 to 0.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture of the last size."),
                io.Latent.Output(tooltip="The same, as the sampler left it."),
            ],
            search_aliases=_ALIASES,
        )

    @classmethod
    @named_errors("DiffuseHigh")
    def execute(
        cls, model, positive, negative, vae, image, scales: str, steps: int, last_steps: int,
        cfg: float, guided_steps: int, strength: float, fade: float, guidance: str,
        sharpen_alpha: float, sharpen_kernel: int, sharpen_sigma_min: float,
        sharpen_sigma_max: float, wavelet: str, levels: int, size_cond: str, tile: str, seed: int,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_model(model, vae)
        picture = _picture(image)
        base = picture.shape[-2], picture.shape[-1]
        settings = Settings(
            guided_steps, strength, fade, guidance == LATENT, sharpen_alpha, sharpen_kernel,
            sharpen_sigma_min, sharpen_sigma_max, wavelet, levels, seed,
        )  # fmt: skip
        require_numbers(cfg=cfg)
        model = _without_rau_net(model)
        sizes = _sizes(scales, base, 64 if _has_hidiffusion(model) else CELL)
        for size in sizes:
            settings.check(size)
        sigmas = _sigmas(model, steps, last_steps, sigmas)
        count = len(sigmas) - 1
        if guided_steps > count:
            raise InfDiTError(f"expected guided_steps of at most {count}; got {guided_steps}")
        if size_cond == _BASE:
            positive, negative = (_with_size(prompt, base) for prompt in (positive, negative))

        codec = Codec(vae, TILES[tile])
        progress = latent_preview.prepare_callback(model, count * len(sizes))
        latent = torch.empty(0)
        for stage, size in enumerate(sizes):
            log.info("DiffuseHigh: %dx%d px, %d of %d", size[1], size[0], stage + 1, len(sizes))
            picture = settings.target(picture, size, stage)
            start = codec.encode(picture)
            guidance_here = Guidance("DiffuseHigh", settings, codec, lambda _, goal=picture: goal)
            noise_seed = (seed + stage) % 2**64
            latent = comfy.sample.sample_custom(
                guided(model, guidance_here),
                comfy.sample.prepare_noise(start, noise_seed),
                cfg,
                comfy.samplers.sampler_object("euler"),
                sigmas,
                positive,
                negative,
                start,
                callback=lambda step, x0, x, _, done=stage * count: progress(
                    done + step, x0, x, count * len(sizes)
                ),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=noise_seed,
            )
            picture = codec.decode(latent)
        return io.NodeOutput(picture.movedim(1, -1), {"samples": latent})


# ---- checks, before any work


def _check_model(model: Any, vae: Any) -> None:
    """InfDiTError unless it is a UNet of latents, and the VAE one for them."""
    require_unet(model)
    require(vae, VAE, "expected a VAE")
    name = type(model.model).__name__
    channels = model.model.latent_format.latent_channels
    cell = vae.spacial_compression_encode()
    if (vae.latent_channels, vae.latent_dim, cell) != (channels, 2, CELL):
        raise InfDiTError(
            f"expected the VAE of {name}, for pictures, with latents of {channels} channels and"
            f" {CELL} px a cell; got one with {vae.latent_channels} channels and {cell} px in"
            f" {vae.latent_dim} dimensions"
        )


def _picture(image: Any) -> torch.Tensor:
    """IMAGE (B, H, W, C) as (B, 3, H, W) float32, without alpha; InfDiTError if it is empty."""
    require(image, torch.Tensor, "expected an IMAGE")
    if image.ndim != 4 or not image.numel() or image.shape[-1] < 3:
        raise InfDiTError(
            f"expected an IMAGE with pixels and three channels; got the shape {tuple(image.shape)}"
        )
    if image.shape[-1] > 3:
        log.info("DiffuseHigh: the picture's alpha is dropped.")
    return image[..., :3].movedim(-1, 1).float().contiguous()


def _sizes(scales: str, size: Size, multiple: int) -> list[Size]:
    try:
        sizes = stage_sizes(scales, size, multiple)
    except ValueError as error:
        raise InfDiTError(f"scales: {error}") from None
    for h, w in sizes:
        if abs(h * size[1] / (w * size[0]) - 1) > 0.1:
            log.warning(
                "DiffuseHigh: %dx%d px is not the shape of the picture, %dx%d, which is stretched.",
                *(w, h, size[1], size[0]),
            )
    return sizes


def _sigmas(model: Any, steps: int, last_steps: int, given: torch.Tensor | None) -> torch.Tensor:
    """The noise levels of every stage: those given, or the schedule's last ones."""
    if given is not None:
        require(given, torch.Tensor, "expected SIGMAS")
        if given.ndim != 1 or len(given) < 2 or not bool((given.diff() < 0).all()):
            raise InfDiTError(f"expected SIGMAS that fall; got {given.tolist()}")
        return given.float()
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete) or len(sampling.sigmas) != 1000:
        kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
        raise InfDiTError(
            "expected a model with eps or v-prediction and 1000 noise levels, or else SIGMAS; got"
            f" {type(model.model).__name__} with {kinds}"
        )
    if last_steps > steps:
        raise InfDiTError(f"expected last_steps of at most steps, {steps}; got {last_steps}")
    # Spaced as the authors' Euler scheduler ("leading").
    return comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps)[-last_steps - 1 :]


# ---- what the stages change in what they are given


def _with_size(prompt: list, size: Size) -> list:
    """CONDITIONING with this size for SDXL, except where it names its own."""
    h, w = size
    told = dict(zip(_SIZE_KEYS, (w, h, 0, 0, w, h), strict=True))
    return [
        [cond, values if values.keys() & told.keys() else values | told] for cond, values in prompt
    ]


def _has_hidiffusion(model: Any) -> bool:
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, HIDIFFUSION))


def _without_rau_net(model: Any) -> Any:
    """The MODEL, with HiDiffusion's window attention alone: the composition is there already."""
    if not _has_hidiffusion(model):
        return model
    log.info("DiffuseHigh: of HiDiffusion only window attention works here; RAU-Net is off.")
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})[RAU_NET_OFF] = True
    return model
