"""Upsample Guidance inside ComfyUI, on the tiny models of HiDiffusion's tests."""

import pytest

from tests.hidiffusion.models import DEFAULTS as HIDIFFUSION
from tests.hidiffusion.models import base_model
from tests.upsample_guidance.models import DEFAULTS


@pytest.fixture
def apply(comfy):
    """The node, with its defaults but a fixed scale, and some changes to them."""

    def run(model, **settings):
        return comfy.nodes["UpsampleGuidance"].execute(model, **DEFAULTS | settings).args[0]

    return run


@pytest.fixture
def hidiffusion(comfy):
    """The node HiDiffusion, with its defaults and some changes to them."""

    def run(model, **settings):
        return comfy.nodes["HiDiffusion"].execute(model, **HIDIFFUSION | settings).args[0]

    return run


@pytest.fixture(params=["sdxl", "sd15"])
def tiny(comfy, request):
    return base_model(request.param)


@pytest.fixture
def sdxl(comfy):
    return base_model("sdxl")
