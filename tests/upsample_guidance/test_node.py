"""The node Upsample Guidance: which models it takes, and what it says to others."""

import pytest
import torch

from tests.hidiffusion.models import base_model, sample
from tests.hidiffusion.test_beside_others import core_node
from tests.hidiffusion.test_node import flux, sd3

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("network", [flux, sd3])
def test_transformers_get_a_clear_error(comfy, apply, network):
    model, made = base_model("sdxl"), network()
    model.add_object_patch("diffusion_model", made)
    name = type(made).__name__
    message = rf"Upsample Guidance: expected .*SDXL, SD 1\.5 or SD 2\.x; got Tiny.* a {name}"
    with pytest.raises(ValueError, match=message):
        apply(model)


def test_inf_dit_gets_a_clear_error(load, apply):
    with pytest.raises(
        ValueError, match=r"SD 2\.x; got InfDiTModel, whose network is a DiffusionModel"
    ):
        apply(load("tiny")[0])
    with pytest.raises(ValueError, match="Upsample Guidance: expected a MODEL; got str"):
        apply("tiny")


def test_other_unets_get_a_clear_error(comfy, apply):
    from comfy import latent_formats

    video = base_model(
        "sd15", use_temporal_attention=True, use_temporal_resblock=True,
        video_kernel_size=[3, 1, 1], merge_strategy="learned_with_images", merge_factor=0.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="got Tiny, whose UNet draws videos"):
        apply(video)
    upscaler = base_model("sd15")
    upscaler.add_object_patch("latent_format", latent_formats.SD_X4())
    with pytest.raises(ValueError, match="got Tiny, whose latents are of the format SD_X4"):
        apply(upscaler)


FLOW = r"expected a model that predicts noise, v or EDM's target; got one with .*Flow and CONST"


def test_flow_models_are_refused_by_the_node_and_by_the_run(sdxl, apply):
    flow = core_node("nodes_model_advanced", "ModelSamplingSD3")()
    with pytest.raises(ValueError, match="Upsample Guidance: " + FLOW):
        apply(flow.patch(sdxl, 3.0)[0])
    (later,) = flow.patch(apply(sdxl), 3.0)
    with pytest.raises(ValueError, match="Upsample Guidance: " + FLOW):
        sample(later, steps=1)


def test_other_predictions(sdxl, apply):
    node = core_node("nodes_model_advanced", "ModelSamplingDiscrete")()
    for sampling in ("eps", "v_prediction", "lcm", "x0"):
        apply(node.patch(sdxl, sampling, False)[0])
    for sampling in ("img_to_img", "img_to_img_flow"):
        with pytest.raises(ValueError, match=r"got one with ModelSamplingDiscrete and IMG_TO_IMG"):
            apply(node.patch(sdxl, sampling, False)[0])


def test_latents_of_other_dimensions_are_refused(sdxl, apply):
    import comfy.sample
    from comfy.samplers import sampler_object

    from tests.hidiffusion.models import prompts

    noise = torch.zeros(1, 4, 1, 8, 8)
    message = r"Upsample Guidance: expected a latent of 4 dimensions .* got \(1, 4, 1, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        comfy.sample.sample_custom(
            apply(sdxl), noise, 1.0, sampler_object("euler"), torch.tensor([5.0, 0.0]), *prompts(),
            noise,
        )  # fmt: skip


def test_the_native_sides(comfy):
    from comfy import latent_formats
    from comfy.model_base import ModelType

    side = comfy.module("nodes.upsample_guidance.node").native_side
    v = ModelType.V_PREDICTION
    assert side(base_model("sdxl")) == side(base_model("sdxl", model_type=v)) == 128
    assert side(base_model("sd15")) == 64
    assert side(base_model("sd15", model_type=v)) == 96, "SD 2.1 for 768 px"
    playground = base_model("sdxl", model_type=ModelType.EDM)
    playground.add_object_patch("latent_format", latent_formats.SDXL_Playground_2_5())
    assert side(playground) == 128
