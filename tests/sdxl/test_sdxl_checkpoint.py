"""The random checkpoint of the SDXL chain is, but for its values, the released model's."""

import pytest
import torch

from tools.sdxl_checkpoint import checkpoint_tensors

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def tensors(comfy):
    return checkpoint_tensors()


@pytest.mark.parametrize(
    ("prefix", "keys", "parameters"),
    [
        ("model.diffusion_model.", 1680, 2_567_463_684),
        ("first_stage_model.", 248, 83_653_863),
        ("conditioner.embedders.0.transformer.", 197, 123_060_480 + 77),  # 77: position_ids
        ("conditioner.embedders.1.model.", 390, 694_659_840 + 1),  # 1: logit_scale
        ("", 2515, 3_468_837_945),
    ],
)
def test_keys_and_parameters_are_those_of_the_release(tensors, prefix, keys, parameters):
    part = [tensor for key, tensor in tensors.items() if key.startswith(prefix)]
    assert (len(part), sum(tensor.numel() for tensor in part)) == (keys, parameters)


def test_comfyui_takes_it_for_sdxl(tensors):
    from comfy import model_detection, supported_models

    prefix = model_detection.unet_prefix_from_state_dict(tensors)
    config = model_detection.model_config_from_unet(tensors, prefix)
    assert type(config) is supported_models.SDXL
    assert not config.inpaint_model()


def test_open_clips_layout(tensors):
    prefix = "conditioner.embedders.1.model."
    assert tensors[f"{prefix}transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert tensors[f"{prefix}positional_embedding"].shape == (77, 1280)
    assert tensors[f"{prefix}text_projection"].dtype is torch.float16
