"""The tiny SDXL and VAE that the recordings were made with, and DiffuseHigh's nodes on them.

Import inside ComfyUI only: the functions import it, the module does not.
"""

import json

import torch
from safetensors.torch import load_file

from tests.goldens import golden, golden_path
from tests.hidiffusion.models import base_model

PIPELINE = json.loads(golden_path("diffusehigh/pipeline.json").read_text())
GUIDANCE = {
    "guided_steps": 5,
    "strength": 1.0,
    "fade": 0.0,
    "guidance": "image",
    "sharpen_alpha": 1.0,
    "sharpen_kernel": 3,
    "sharpen_sigma_min": 0.1,
    "sharpen_sigma_max": 2.0,
    "wavelet": "db4",
    "levels": 1,
    "tile": "auto",
    "seed": 0,
}
"""Defaults of the guidance's widgets."""
LOOP = {"scales": "1.5, 2.0", "steps": 50, "last_steps": 15, "cfg": 10.0, "size_cond": "base"}
"""Defaults of what DiffuseHigh has besides."""


def tiny_vae():
    from comfy.sd import VAE

    prefix = "first_stage_model."
    tensors = load_file(golden_path("diffusehigh/vae_ldm.safetensors"))
    config = json.loads(golden_path("diffusehigh/vae_config.json").read_text())
    state = {k.removeprefix(prefix): v.float() for k, v in tensors.items()}
    return VAE(sd=state, config=config["comfy_vae_config"])


def tiny_model(name="sdxl", **arguments):
    """A tiny UNet whose output is scaled as for the recordings, since random weights amplify."""
    model = base_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.model.diffusion_model.out[2].parameters():
            parameter *= PIPELINE["unet_out_scale"]
    return model


def prompts(**more):
    """The recordings' positive and negative prompt, as CONDITIONING."""
    cond = golden("hidiffusion/sdxl/cond.safetensors")
    context, y = cond["context"].float(), cond["y"].float()
    return [[[context[i : i + 1], {"pooled_output": y[i : i + 1], **more}]] for i in (1, 0)]


def picture(h=64, w=64, batch=1, seed=0):
    """A smooth random IMAGE."""
    small = torch.rand(batch, 3, h // 8, w // 8, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (h, w), mode="bicubic").clamp(0, 1)
    return large.movedim(1, -1)


def state(model):
    """The weights and options of a model, to compare afterwards."""
    weights = {k: v.clone() for k, v in model.model.state_dict().items()}
    return weights, repr(model.model_options), repr(model.wrappers)


def assert_same_state(before, model):
    weights, *texts = state(model)
    assert all(torch.equal(before[0][k], v) for k, v in weights.items())
    assert list(before[1:]) == texts
