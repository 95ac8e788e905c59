"""What DiffuseHigh's nodes take, and what they say to the rest, before any work."""

import logging

import pytest
import torch

from tests.diffusehigh.models import picture, prompts, tiny_model
from tests.hidiffusion.test_node import flux, sd3

pytestmark = pytest.mark.comfy

NODES = ["DiffuseHigh", "DiffuseHigh Guidance"]
SHORT = {"scales": "1.5", "last_steps": 3, "guided_steps": 1}


@pytest.fixture(params=NODES)
def apply(request, loop, guide):
    return loop if request.param == NODES[0] else guide


@pytest.fixture
def no_work(monkeypatch, vae):
    """Fail at the first use of the VAE."""
    monkeypatch.setattr(vae.first_stage_model, "encode", None)
    monkeypatch.setattr(vae.first_stage_model, "decode", None)


@pytest.mark.parametrize("network", [flux, sd3])
def test_transformers_get_a_clear_error(apply, network, sdxl, no_work):
    made = network()
    sdxl.add_object_patch("diffusion_model", made)
    name = type(made).__name__
    match = rf"^DiffuseHigh.*: expected .* SD 1\.5 or SD 2\.x; got Tiny, whose network is a {name}"
    with pytest.raises(ValueError, match=match):
        apply(sdxl)


def test_inf_dit_gets_a_clear_error(apply, load, no_work):
    with pytest.raises(ValueError, match=r"expected .* SDXL.*; got InfDiTModel"):
        apply(load("tiny")[0])


def test_what_is_no_model_vae_or_picture_is_named(apply, sdxl, vae, no_work):
    with pytest.raises(ValueError, match="expected a MODEL; got str"):
        apply("model")
    with pytest.raises(ValueError, match="expected a VAE; got str"):
        apply(sdxl, vae="vae")
    with pytest.raises(ValueError, match="expected an IMAGE; got str"):
        apply(sdxl, image="image")
    for shape in ((0, 64, 64, 3), (1, 64, 64, 1), (64, 64, 3)):
        with pytest.raises(ValueError, match=r"expected an IMAGE with pixels.*; got the shape"):
            apply(sdxl, torch.zeros(shape))
    vae.latent_channels = 16
    with pytest.raises(ValueError, match=r"expected the VAE of Tiny.* 4 channels.* with 16 chan"):
        apply(sdxl)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scales": ""}, r"scales: expected factors above 1.*; got none"),
        ({"scales": "2, 1.5"}, r"scales: .* larger than the one before.* got '1.5'"),
        ({"steps": 10, "last_steps": 11}, "expected last_steps of at most steps, 10; got 11"),
        ({"guided_steps": 16}, "expected guided_steps of at most 15; got 16"),
        ({"sharpen_kernel": 4}, "expected an odd sharpen_kernel below 192 .* 96x96 px; got 4"),
        ({"sharpen_sigma_min": 3.0}, "expected sharpen_sigma_min .* got 3 and 2"),
        ({"levels": 8}, "expected at most 7 levels of db4 for a picture of 96x96 px.* got 8"),
        ({"levels": 4, "guidance": "latent"}, "expected at most 3 levels .* latents.*; got 4"),
        ({"sigmas": torch.tensor([0.5])}, "expected SIGMAS that fall"),
        ({"sigmas": torch.tensor([0.5, 0.6, 0.0])}, "expected SIGMAS that fall"),
    ],
)
def test_settings_that_do_not_fit(loop, sdxl, no_work, changes, match):
    with pytest.raises(ValueError, match=f"^DiffuseHigh: {match}"):
        loop(sdxl, **{"scales": "1.5"} | changes)


def test_another_schedule_needs_sigmas(comfy, loop, no_work):
    from comfy.model_base import ModelType

    model = tiny_model(model_type=ModelType.EDM)
    with pytest.raises(ValueError, match=r"1000 noise levels, or else SIGMAS; got Tiny with .*EDM"):
        loop(model)


def test_sigmas_replace_the_schedule(comfy, loop, node, sdxl):
    from comfy.model_base import ModelType

    given = node._sigmas(sdxl, 50, 3, None)
    expected, _ = loop(sdxl, **SHORT)
    found, _ = loop(sdxl, **SHORT | {"steps": 7, "last_steps": 5}, sigmas=given)
    assert torch.equal(found, expected)
    edm, _ = loop(tiny_model(model_type=ModelType.EDM), **SHORT, sigmas=given)
    assert edm.isfinite().all()
    assert not torch.equal(edm, expected)


def test_a_picture_without_shape_of_eights_and_with_alpha(loop, sdxl, caplog):
    image = picture(72, 104)[:, :67, :101]
    with caplog.at_level(logging.INFO):
        result, latent = loop(sdxl, torch.cat([image, image[..., :1]], -1), **SHORT)
    assert "alpha is dropped" in caplog.text
    assert "stretched" not in caplog.text
    assert result.shape == (1, 104, 152, 3)
    assert latent["samples"].shape == (1, 4, 13, 19)
    assert torch.equal(loop(sdxl, image, **SHORT)[0], result)


def test_a_stretched_shape_is_said(loop, sdxl, caplog):
    with caplog.at_level(logging.WARNING):
        loop(sdxl, **SHORT | {"scales": "128x80", "last_steps": 1})
    assert "128x80 px is not the shape of the picture, 64x64" in caplog.text


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_batch_is_drawn_picture_by_picture(comfy, loop, name):
    images = torch.cat([picture(seed=1), picture(seed=2)])
    model = tiny_model(name)
    both, _ = loop(model, images, **SHORT)
    one, _ = loop(model, images[:1], **SHORT)
    assert both.shape == (2, 96, 96, 3)
    torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("size_cond", ["base", "target"])
def test_the_size_that_sdxl_is_told(loop, sdxl, monkeypatch, size_cond):
    told = []
    encode = sdxl.model.encode_adm
    names = ("width", "height", "target_width", "target_height", "crop_w", "crop_h")

    def look(**kwargs):
        told.append(tuple(kwargs.get(name) for name in names))
        return encode(**kwargs)

    monkeypatch.setattr(sdxl.model, "encode_adm", look)
    sizes = {"scales": "1.5, 2", "last_steps": 1, "guided_steps": 0, "size_cond": size_cond}
    loop(sdxl, picture(64, 80), **sizes)
    if size_cond == "base":
        assert set(told) == {(80, 64, 80, 64, 0, 0)}
    else:
        assert set(told) == {(120, 96, None, None, None, None), (160, 128, None, None, None, None)}
    told.clear()
    own = dict(zip(names, (9, 8, 7, 6, 5, 4), strict=True))
    positive, negative = prompts(**own)
    loop(sdxl, picture(64, 80), positive, negative, **sizes)
    assert set(told) == {(9, 8, 7, 6, 5, 4)}


def test_the_seed_chooses_noise_and_blur(loop, sdxl):
    first, again, other = (loop(sdxl, **SHORT, seed=seed)[0] for seed in (3, 3, 2**64 - 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
