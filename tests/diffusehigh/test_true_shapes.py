"""DiffuseHigh on SDXL's own UNet and VAE with random weights, and a small picture.

Two steps each of the loop and of a KSampler; 6 GB of memory.
"""

import math

import psutil
import pytest
import torch

from tests.diffusehigh.models import picture
from tools.sdxl_checkpoint import UNET, VAE

MEMORY_GB = 8
pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.timeout(3600)]


def fill(model):
    """Weights as those of `write_checkpoint`, from one list of random numbers."""
    numbers = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(float(name.endswith("weight")))
            continue
        flat, scale = weight.data.view(-1), 1 / math.sqrt(weight[0].numel())
        for start in range(0, flat.numel(), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)] * scale)


@pytest.fixture(scope="module")
def sdxl(comfy):
    from comfy import model_base, supported_models
    from comfy.model_patcher import ModelPatcher

    if (free := psutil.virtual_memory().available / 1e9) < MEMORY_GB:
        pytest.skip(f"Expected {MEMORY_GB} GB of free memory; got {free:.1f} GB.")
    config = supported_models.SDXL(supported_models.SDXL.unet_config | UNET)
    config.set_inference_dtype(torch.float16, torch.float32)
    model = model_base.SDXL(config)
    model.requires_grad_(False)
    fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def vae(comfy):
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    model = AutoencoderKL(ddconfig=VAE, embed_dim=4).requires_grad_(False)
    fill(model)
    return comfy.sd.VAE(sd=model.state_dict())


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [
        [[
            torch.randn(1, 77, 2048, generator=generator),
            {"pooled_output": torch.randn(1, 1280, generator=generator)},
        ]]
        for _ in range(2)
    ]  # fmt: skip


def fingerprint(model):
    return [float(w.float().sum()) for w in list(model.model.diffusion_model.parameters())[::50]]


@torch.inference_mode()
def test_the_loop_and_a_ksampler(loop, guide, sdxl, vae):
    from nodes import KSampler

    image, before = picture(160, 192), fingerprint(sdxl)
    positive, negative = prompts()
    result, latent = loop(
        sdxl, image, positive, negative, vae=vae, scales="1.5", last_steps=2, guided_steps=1
    )
    assert result.shape == (1, 240, 288, 3)
    assert latent["samples"].shape == (1, 4, 30, 36)
    assert result.isfinite().all()
    assert result.std() > 0.02

    start = {"samples": vae.encode(result)}
    found = [
        KSampler().sample(model, 3, 2, 3.0, "euler", "normal", positive, negative, start, 0.3)[0]
        for model in (sdxl, guide(sdxl, image, vae=vae, guided_steps=1))
    ]
    plain, guided = (result["samples"] for result in found)
    assert plain.shape == guided.shape == latent["samples"].shape
    assert guided.isfinite().all()
    assert not torch.allclose(plain, guided)
    sdxl.detach()
    assert fingerprint(sdxl) == before
