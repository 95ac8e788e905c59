"""Tiny UNets of SDXL's and SD 1.5's topology in ComfyUI's models, and its KSampler nodes.

Import inside ComfyUI only: the functions import it, the module does not.
"""

import json
import math
from functools import cache

import torch

from tests.goldens import golden, golden_path

DEFAULTS = {
    "preset": "auto",
    "rau_net": "auto",
    "window_attention": True,
    "t1": 0.4,
    "t2": 0.0,
    "aggressive_ratio": 0.16,
    "seed": 0,
    "timing": "sampler steps",
}
WEIGHTS_SEED = {"sdxl": 20240, "sd15": 20241}


def unet_arguments(name):
    return json.loads(golden_path(f"hidiffusion/{name}/config.json").read_text())[
        "comfy_unet_kwargs"
    ]


def draw(shape, generator):
    """torch.randn in float64: its float32 differs between processors, its torch.rand does not."""
    if math.prod(shape) < 16:
        return torch.randn(shape, generator=generator).double()
    u = torch.rand(math.prod(shape), generator=generator).double().view(-1, 2, 8)
    radius, angle = (-2 * (1 - u[:, :1]).log()).sqrt(), 2 * math.pi * u[:, 1:]
    return (radius * torch.cat([angle.cos(), angle.sin()], 1)).view(shape)


def rounded(flat, name):
    """In half precision as recorded, which is one step off where float32 had rounded before."""
    known, flat = golden(f"hidiffusion/{name}_rounding.safetensors"), flat.half()
    flat[known["index"].long()] = known["value"]
    return flat


def base_latent():
    """The noise (1, 4, 256, 256) whose corners were the inputs of the recordings."""
    noise = draw((1, 4, 256, 256), torch.Generator().manual_seed(77))
    return rounded(noise.flatten(), "latents").view(noise.shape).float()


@cache
def unet_state(name):
    """The weights of the recordings, float16, drawn in the order of diffusers' names."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from comfy.utils import unet_to_diffusers

    arguments, drawn = unet_arguments(name), {}
    unet = UNetModel(**arguments, device="meta", operations=disable_weight_init)
    shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(WEIGHTS_SEED[name])
    for theirs, ours in sorted(unet_to_diffusers(arguments).items()):
        if ours not in shapes or theirs.startswith("class_embedding."):
            continue  # the map has keys of other networks, and SDXL's embedding under two names
        tensor = draw(shapes[ours], generator)
        if tensor.ndim > 1:
            gain = 1.6 if theirs.endswith(("to_q.weight", "to_k.weight")) else 1.0
            gain = 0.8 if theirs.endswith("conv2.weight") else gain
            tensor *= gain * tensor[0].numel() ** -0.5
        elif theirs.endswith("weight"):
            tensor = 1 + 0.2 * tensor
        else:
            tensor *= 0.1 if "norm" in theirs else 0.05
        drawn[ours] = tensor
    flat = rounded(torch.cat([t.flatten() for t in drawn.values()]), f"{name}/weights")
    parts = flat.split([t.numel() for t in drawn.values()])
    return {k: p.view(shapes[k]) for k, p in zip(drawn, parts, strict=True)}


def base_model(name, dtype=torch.float32, manual_cast=None, model_type=None, **arguments):
    """A comfy BaseModel around the tiny UNet, in a ModelPatcher."""
    from comfy import latent_formats
    from comfy.model_base import BaseModel, ModelType
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import BASE

    class Tiny(BaseModel):
        def encode_adm(self, **kwargs):
            return kwargs["pooled_output"] if self.adm_channels else None

    config = BASE({})
    config.unet_config = unet_arguments(name) | arguments
    config.latent_format = latent_formats.SDXL() if name == "sdxl" else latent_formats.SD15()
    config.set_inference_dtype(dtype, manual_cast)
    model = Tiny(config, model_type or ModelType.EPS)
    if not arguments:
        state = {k: v.to(dtype, copy=True) for k, v in unet_state(name).items()}
        model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def prompts(control=None):
    """The positive and the negative prompt, as CONDITIONING."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 1, 7, 32, generator=generator)
    y = torch.randn(2, 1, 64, generator=generator)
    extra = {} if control is None else {"control": control, "control_apply_to_uncond": True}
    return [[[context[i], {"pooled_output": y[i], **extra}]] for i in (0, 1)]


def sample(
    model, steps=10, sampler="euler", scheduler="normal", size=(24, 32), cfg=4.0, seed=3,
    control=None, denoise=1.0,
):  # fmt: skip
    """The result of a KSampler node, from an empty latent of `size`."""
    from nodes import KSampler

    positive, negative = prompts(control)
    latent = {"samples": torch.zeros(1, 4, *size)}
    (result,) = KSampler().sample(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise
    )
    return result["samples"]


def sample_stage(model, steps, start, end, latent, scheduler="normal"):
    """Steps `start` to `end` of `steps`, by a KSampler (Advanced) node."""
    from nodes import KSamplerAdvanced

    noise, leftover = ("disable" if start else "enable"), ("enable" if end < steps else "disable")
    (result,) = KSamplerAdvanced().sample(
        model, noise, 3, steps, 4.0, "euler", scheduler, *prompts(), {"samples": latent}, start,
        end, leftover,
    )  # fmt: skip
    return result["samples"]


def watch(model):
    """Record (sigma, rad, pool, windows, batch, levels) of every evaluation of the UNet."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def look(executor, x, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[4]
        changes = options["hidiffusion"]
        order = {key: tuple(w.order.tolist()) for key, w in changes.windows.items()}
        sigma = float(options["sigmas"][0])
        levels = tuple(options.get("sample_sigmas", torch.empty(0)).tolist())
        seen.append((sigma, changes.rad, changes.pool, order, x.shape[0], levels))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    return seen


def forward(model, size=(24, 32)):
    """The output of the unpatched UNet."""
    positive, _ = prompts()
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5))
    y = {"y": positive[0][1]["pooled_output"]} if model.model.adm_channels else {}
    with torch.no_grad():
        return model.model.diffusion_model(
            x, torch.tensor([500.0]), context=positive[0][0], transformer_options={}, **y
        )


def residuals(b, h, w):
    """What an SDXL ControlNet hands out for a latent of h×w."""
    sizes = [(h, w)] * 3 + [(h // 2, w // 2)] * 3 + [(h // 4, w // 4)] * 3
    channels = [32] * 7 + [64] * 2
    output = [torch.full((b, c, *s), 0.5) for c, s in zip(channels, sizes, strict=True)]
    return {"output": output, "middle": [output[-1].clone()]}
