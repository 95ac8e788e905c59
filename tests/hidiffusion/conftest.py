"""HiDiffusion's modules inside ComfyUI, and tiny models for them."""

import pytest
import torch

from tests.hidiffusion.models import DEFAULTS, base_model, unet_arguments, unet_state


@pytest.fixture(scope="session")
def hi(comfy):
    """The module with the hooks."""
    return comfy.module("nodes.hidiffusion.hooks")


@pytest.fixture(scope="session")
def rules(comfy):
    """The module with the schedule, as the hooks use it."""
    return comfy.module("nodes.hidiffusion.rules")


@pytest.fixture(scope="session")
def unets(comfy):
    """The tiny UNets that the recordings were made with."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    made = {}
    for name in ("sdxl", "sd15"):
        arguments = unet_arguments(name)
        unet = UNetModel(**arguments, dtype=torch.float32, operations=disable_weight_init)
        unet.load_state_dict({k: v.float() for k, v in unet_state(name).items()})
        made[name] = unet.eval().requires_grad_(False)
    return made


@pytest.fixture(params=["sdxl", "sd15"])
def tiny(comfy, request):
    return base_model(request.param)


@pytest.fixture
def sdxl(comfy):
    return base_model("sdxl")


@pytest.fixture
def apply(comfy):
    """The node, with its defaults and some changes to them."""

    def run(model, **settings):
        return comfy.nodes["HiDiffusion"].execute(model, **DEFAULTS | settings).args[0]

    return run
