"""DiffuseHigh's modules inside ComfyUI, and its nodes on tiny models."""

import pytest

from tests.diffusehigh.models import GUIDANCE, LOOP, picture, prompts, tiny_model, tiny_vae


@pytest.fixture(scope="session")
def rules(comfy):
    return comfy.module("nodes.diffusehigh.rules")


@pytest.fixture(scope="session")
def node(comfy):
    """The module of the nodes."""
    return comfy.module("nodes.diffusehigh.node")


@pytest.fixture
def vae(comfy):
    return tiny_vae()


@pytest.fixture
def sdxl(comfy):
    return tiny_model()


@pytest.fixture
def loop(comfy, vae):
    """The node DiffuseHigh, with its defaults, a small picture and some changes."""

    def run(model, image=None, positive=None, negative=None, **settings):
        image = picture() if image is None else image
        settings = {"positive": positive, "negative": negative, "vae": vae} | settings
        for name, prompt in zip(("positive", "negative"), prompts(), strict=True):
            settings[name] = prompt if settings[name] is None else settings[name]
        inputs = GUIDANCE | LOOP | settings
        return comfy.nodes["DiffuseHigh"].execute(model, image=image, **inputs).args

    return run


@pytest.fixture
def guide(comfy, vae):
    """The node DiffuseHigh Guidance."""

    def run(model, image=None, **settings):
        image = picture() if image is None else image
        inputs = GUIDANCE | {"vae": vae} | settings
        return comfy.nodes["DiffuseHighGuidance"].execute(model, image=image, **inputs).args[0]

    return run
