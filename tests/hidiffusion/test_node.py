"""The node HiDiffusion: which models it takes, and what it says to others."""

import pytest

from tests.hidiffusion.models import base_model

pytestmark = pytest.mark.comfy


def flux():
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    return Flux(
        in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=16,
        mlp_ratio=1.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[2, 2, 4], theta=100,
        patch_size=1, qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
        operations=disable_weight_init,
    )  # fmt: skip


def sd3():
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ops import disable_weight_init

    return MMDiT(depth=1, num_blocks=1, context_size=8, operations=disable_weight_init)


@pytest.mark.parametrize("network", [flux, sd3])
def test_transformers_get_a_clear_error(comfy, apply, network):
    model, made = base_model("sdxl"), network()
    model.add_object_patch("diffusion_model", made)
    name = type(made).__name__
    with pytest.raises(ValueError, match=rf"SDXL, SD 1\.5 or SD 2\.x; got Tiny.* a {name}"):
        apply(model)


def test_other_unets_get_a_clear_error(comfy, apply):
    # A distilled SDXL without attention in the middle.
    pruned = base_model("sdxl", transformer_depth_middle=-1)
    with pytest.raises(ValueError, match=r"rrrDaaDaa/a/aaAaaArrr.* got Tiny .*rrrDaaDaa/r/aaA"):
        apply(pruned)
    refiner = base_model("sd15", transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="HiDiffusion: expected the blocks of SDXL"):
        apply(refiner)
    video = base_model(
        "sd15", use_temporal_attention=True, use_temporal_resblock=True,
        video_kernel_size=[3, 1, 1], merge_strategy="learned_with_images", merge_factor=0.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected the blocks.* got Tiny with the blocks r\?\?D"):
        apply(video)


def patch_in(model):
    from comfy.patcher_extension import WrappersMP

    (wrapper,) = model.get_wrappers(WrappersMP.APPLY_MODEL, "hidiffusion")
    return wrapper.__self__


def test_what_auto_finds(comfy, apply):
    from comfy.model_base import ModelType

    def found(name, preset="auto", **arguments):
        patch = patch_in(apply(base_model(name, **arguments), preset=preset))
        return patch.family.name, patch.family.native, patch.gentle

    assert found("sdxl") == ("SDXL", 128, False)
    assert found("sdxl", "SDXL-Turbo") == ("SDXL-Turbo", 64, False)
    assert found("sd15") == ("SD1.5/2.x", 64, False)
    # SD 2.1 for 768 px; other heads and text width than SD 1.5, the same blocks.
    v = ModelType.V_PREDICTION
    assert found("sd15", model_type=v, num_head_channels=16) == ("SD1.5/2.x", 96, False)
    assert found("sdxl", model_type=v) == ("SDXL", 128, False)
    # In-painting models and Playground 2.5.
    assert found("sdxl", in_channels=9) == ("SDXL", 128, True)
    assert found("sdxl", model_type=ModelType.EDM) == ("SDXL", 128, True)


def test_a_preset_of_another_family_is_an_error(comfy, apply):
    with pytest.raises(ValueError, match=r"expected an SDXL model.* got the blocks of SD1\.5/2\.x"):
        apply(base_model("sd15"), preset="SDXL")
    with pytest.raises(ValueError, match=r"expected an SD1\.5/2\.x model"):
        apply(base_model("sdxl"), preset="SD1.5/2.x")
