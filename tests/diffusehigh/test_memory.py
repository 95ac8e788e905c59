"""The VAE between the steps: tiles, want of memory, and the model that it pushes out."""

import logging

import pytest
import torch

from tests.diffusehigh.models import picture

pytestmark = pytest.mark.comfy
SHORT = {"scales": "1.5", "last_steps": 4, "guided_steps": 2}


@pytest.fixture
def codec(comfy, vae):
    """The VAE in tiles of a size."""
    return lambda *tile: comfy.module("nodes.diffusehigh.vae").Codec(vae, *tile)


@torch.inference_mode()
def test_up_to_1024_px_it_is_comfyuis_vae(codec, vae):
    x = picture(72, 104, batch=2)
    latent = codec().encode(x.movedim(-1, 1))
    decoded = codec().decode(latent).movedim(1, -1)
    for i in (0, 1):  # ComfyUI may take several pictures at once, which rounds differently
        assert torch.equal(latent[i : i + 1], vae.encode(x[i : i + 1]))
        assert torch.equal(decoded[i : i + 1], vae.decode(latent[i : i + 1]))


@pytest.fixture
def sides(vae, monkeypatch):
    """Sizes in pixels of what the VAE is given, in order."""
    seen, model = [], vae.first_stage_model
    for name, call, cell in (("encode", model.encode, 1), ("decode", model.decode, 8)):

        def look(x, call=call, cell=cell):
            seen.append((x.shape[-2] * cell, x.shape[-1] * cell))
            return call(x)

        monkeypatch.setattr(model, name, look)
    return seen


@torch.inference_mode()
def test_tiles_overlap_by_a_quarter(codec, vae, sides):
    x = picture(256, 384)
    whole, tiled = codec(), codec(256)
    latent = tiled.encode(x.movedim(-1, 1))
    assert sides == [(256, 256), (256, 192)]
    sides.clear()
    decoded = tiled.decode(latent)
    assert sides == [(256, 256), (256, 192)]
    assert latent.shape == (1, 4, 32, 48)
    assert decoded.shape == (1, 3, 256, 384)
    # Apart from the tiles' statistics it is the same.
    assert (decoded - whole.decode(latent)).abs().mean() < 0.1


def test_tiles_are_chosen_before_sampling_beyond_1024_px(codec, monkeypatch, vae):
    """By size: nothing runs out of memory on the way."""
    given = []
    monkeypatch.setattr(
        vae.first_stage_model,
        "encode",
        lambda x: given.append(tuple(x.shape[-2:])) or x[:, :1, ::8, ::8].expand(-1, 4, -1, -1),
    )
    for h, w in ((1024, 1024), (1032, 1024), (1536, 2048)):
        given.clear()
        codec().encode(torch.zeros(1, 3, h, w))
        assert given[0] == (1024, 1024)
        assert (len(given) == 1) == ((h, w) == (1024, 1024))
    given.clear()
    codec(2**20).encode(torch.zeros(1, 3, 1536, 2048))
    assert given == [(1536, 2048)]


def out_of_memory_above(vae, monkeypatch, side, names=("encode", "decode")):
    model = vae.first_stage_model
    for name, call, cell in (("encode", model.encode, 1), ("decode", model.decode, 8)):

        def limited(x, call=call, cell=cell):
            if max(x.shape[-2:]) * cell > side:
                raise torch.OutOfMemoryError("injected")
            return call(x)

        if name in names:
            monkeypatch.setattr(model, name, limited)


def test_want_of_memory_makes_tiles_smaller_and_keeps_the_stage(
    loop, sdxl, vae, sides, monkeypatch, caplog
):
    settings = {"scales": "2", "last_steps": 2, "guided_steps": 1}
    image = picture(128, 128)
    expected, _ = loop(sdxl, image, **settings, tile="off")
    sides.clear()
    out_of_memory_above(vae, monkeypatch, 128, ["decode"])
    with caplog.at_level(logging.WARNING):
        found, _ = loop(sdxl, image, **settings, tile="off")
    assert caplog.text.count("out of memory in the VAE; now in tiles of 128 px") == 1
    assert sides[0] == (256, 256), "the picture was encoded whole before"
    assert max(sides[1:]) == (128, 128), "smaller tiles for the rest of the run"
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.2


def test_memory_for_no_tile_at_all_is_an_error(codec, vae, monkeypatch):
    out_of_memory_above(vae, monkeypatch, 64)
    tiled = codec()
    with pytest.raises(torch.OutOfMemoryError):
        tiled.encode(torch.zeros(1, 3, 512, 512))
    assert tiled.tile == 128


@pytest.fixture
def loads(caplog):
    """How often the UNet and the VAE were put into memory."""
    caplog.set_level(logging.INFO)

    def count():
        found = [caplog.text.count(f"Requested to load {n}") for n in ("Tiny", "AutoencoderKL")]
        caplog.clear()
        return found

    return count


def with_lora(model):
    model = model.clone()
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    key = "diffusion_model.input_blocks.0.0.weight"
    assert model.add_patches({key: ("diff", (change,))})
    return model


def test_a_model_that_the_vae_pushes_out_is_loaded_again(loop, sdxl, monkeypatch, loads):
    """With a LoRA, which is gone from the weights of a model that is not loaded."""
    import comfy.model_management as mm

    model = with_lora(sdxl)
    plain, _ = loop(sdxl, **SHORT)
    loads()
    roomy, _ = loop(model, **SHORT)
    unet, _ = loads()
    assert unet == 1, "once a stage where there is room for both"
    assert not torch.equal(roomy, plain)

    load = mm.load_models_gpu

    def tight(models, *args, **kwargs):
        """One kind of model at a time."""
        wanted = [m.model for m in models]
        others = [m for m in mm.current_loaded_models if m.model.model not in wanted]
        keep = [m for m in mm.current_loaded_models if m not in others]
        mm.free_memory(1e30, torch.device("cpu"), keep)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", tight)
    found, _ = loop(model, **SHORT)
    unet, autoencoder = loads()
    assert unet == 1 + 2, "for the stage, and after each of two guided steps of four"
    assert autoencoder == 2 + 1, "for two guided steps and the end; at the start it was there"
    assert torch.equal(found, roomy)


def test_controlnets_are_loaded_again_as_well(guide, sdxl, monkeypatch, comfy):
    """All that the guider loaded: a VAE pushes out what it finds."""
    module = comfy.module("nodes.diffusehigh.vae")
    mm = module.comfy.model_management
    asked = []
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, **kwargs: asked.append(models))

    class Guider:
        model_patcher, loaded_models, conds = sdxl, ["controlnet"], {}

    module.load_again(Guider(), torch.Size((1, 4, 12, 12)))
    assert asked == [[sdxl, "controlnet"]]
