"""The guidance in sampling: when it acts, what it leaves behind, progress and cancel."""

import logging

import pytest
import torch

from tests.diffusehigh.models import assert_same_state, picture, prompts, state, tiny_model
from tests.hidiffusion.models import forward

pytestmark = pytest.mark.comfy
SHORT = {"scales": "1.5", "last_steps": 3, "guided_steps": 1}


def sample(model, sampler="euler", size=(12, 12), steps=4, denoise=0.5, latent=None):
    """The result of a KSampler node on a latent that is not empty."""
    from nodes import KSampler

    start = torch.full((1, 4, *size), 0.5) if latent is None else latent
    (result,) = KSampler().sample(
        model, 3, steps, 3.0, sampler, "normal", *prompts(), {"samples": start}, denoise
    )
    return result["samples"]


@pytest.fixture
def decoded(vae, monkeypatch):
    """What the VAE decodes, tile by tile."""
    seen, decode = [], vae.first_stage_model.decode

    def look(z, **kwargs):
        seen.append(z)
        return decode(z, **kwargs)

    monkeypatch.setattr(vae.first_stage_model, "decode", look)
    return seen


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("euler", 2), ("dpm_2", 4), ("heun", 3), ("dpmpp_2m", 2)]
)
def test_only_the_first_steps_are_guided(guide, sdxl, decoded, sampler, evaluations):
    """heun's second evaluation lies on the next step's level; dpm_2's between two levels."""
    sample(guide(sdxl, guided_steps=2), sampler)
    assert len(decoded) == evaluations


def test_what_guides_nothing_changes_nothing(guide, sdxl, decoded):
    expected = sample(sdxl)
    for settings in ({"guided_steps": 0}, {"strength": 0.0}):
        assert torch.equal(sample(guide(sdxl, **settings)), expected)
    assert not decoded
    assert not torch.equal(sample(guide(sdxl)), expected)


def test_the_strength_fades_over_the_guided_steps(guide, node, sdxl, rules, monkeypatch):
    used, swap = [], rules.swap_low_band

    def look(x, low, wavelet, levels, strength):
        used.append(strength)
        return swap(x, low, wavelet, levels, strength)

    monkeypatch.setattr(f"{node.Settings.__module__}.swap_low_band", look)
    sample(guide(sdxl, guidance="latent", strength=0.8, fade=0.5, guided_steps=2))
    assert used == pytest.approx([0.8, 0.6])


def test_guidance_in_latents_needs_no_vae_in_the_loop(guide, sdxl, rules, decoded, vae):
    """One step is the denoised latent itself, whose low band is that of the picture's latent."""
    model = guide(sdxl, guidance="latent", guided_steps=1, wavelet="haar", sharpen_alpha=0.0)
    found = sample(model, steps=1, denoise=0.3)
    assert not decoded
    enlarged = rules.enlarge(picture().movedim(-1, 1), (96, 96)).movedim(1, -1)
    low, expected = (rules.low_band(x, "haar", 1) for x in (found, vae.encode(enlarged)))
    torch.testing.assert_close(low, expected, rtol=1e-4, atol=1e-3)


def test_settings_count(loop, sdxl):
    results = [
        loop(sdxl, **SHORT | changes)[0]
        for changes in (
            {},
            {"cfg": 5.0},
            {"guidance": "latent"},
            {"sharpen_alpha": 0.5},
            {"sharpen_kernel": 5, "sharpen_sigma_min": 2.0},
            {"sharpen_sigma_min": 2.0},
            {"wavelet": "sym4"},
            {"levels": 2},
            {"guided_steps": 2},
            {"guided_steps": 2, "fade": 0.9},
        )
    ]
    for i, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:i]), i


def test_the_second_of_two_nodes_wins_and_says_so(guide, loop, sdxl, caplog):
    expected = sample(guide(sdxl, picture(seed=2)))
    with caplog.at_level(logging.WARNING):
        twice = guide(guide(sdxl, picture(seed=1), guided_steps=3), picture(seed=2))
    assert "DiffuseHigh Guidance: the model has DiffuseHigh Guidance already" in caplog.text
    assert torch.equal(sample(twice), expected)
    assert torch.equal(loop(guide(sdxl), **SHORT)[0], loop(sdxl, **SHORT)[0])


def test_batches_that_do_not_fit_are_named(guide, sdxl):
    model = guide(sdxl, picture(batch=2))
    with pytest.raises(ValueError, match=r"^DiffuseHigh Guidance: expected one .* 1; got 2"):
        sample(model)
    with pytest.raises(ValueError, match=r"^DiffuseHigh Guidance: expected at most 0 levels of db"):
        sample(guide(sdxl, guidance="latent"), size=(6, 6))


def test_one_progress_bar_with_previews(loop, sdxl, monkeypatch):
    import comfy.utils
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    seen = []
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: seen.append((value, total, preview[1].size)),
    )
    loop(sdxl, scales="1.5, 2", last_steps=3, guided_steps=1, tile="256")
    assert [s[:2] for s in seen] == [(i + 1, 6) for i in range(6)]
    assert [s[2] for s in seen] == [(12, 12)] * 3 + [(16, 16)] * 3


def plain_is_as_before(model, action):
    """Do `action`; the model's weights, options and output are equal to the bit afterwards."""
    before, output = state(model), forward(model)
    action()
    model.detach()
    assert_same_state(before, model)
    assert torch.equal(forward(model), output)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_after_a_run_the_plain_model_is_the_same(comfy, loop, guide, name):
    model = tiny_model(name)
    plain_is_as_before(model, lambda: (loop(model, **SHORT), sample(guide(model), steps=2)))


@pytest.mark.parametrize("where", ["encode", "decode", "unet"])
def test_after_an_error_the_plain_model_is_the_same(loop, sdxl, vae, monkeypatch, where):
    def fail(*args, **kwargs):
        raise RuntimeError("injected")

    def run():
        owner = vae.first_stage_model if where != "unet" else sdxl.model.diffusion_model
        with monkeypatch.context() as m:
            m.setattr(owner, where if where != "unet" else "forward", fail)
            with pytest.raises(RuntimeError, match="injected"):
                loop(sdxl, **SHORT)

    plain_is_as_before(sdxl, run)


@pytest.mark.parametrize("when", ["sampling", "decoding"])
def test_after_a_cancel_the_plain_model_is_the_same(loop, sdxl, vae, monkeypatch, when):
    """A cancel that comes while a step is computed ends the run within this step."""
    import comfy.model_management as mm

    model, steps = sdxl.model.diffusion_model, []
    forwards, decode = model.forward, vae.first_stage_model.decode

    def look(*args, **kwargs):
        steps.append("unet")
        if when == "sampling":
            mm.interrupt_current_processing()
        return forwards(*args, **kwargs)

    def cancel(z, **kwargs):
        steps.append("vae")
        mm.interrupt_current_processing()
        return decode(z, **kwargs)

    def run():
        with monkeypatch.context() as m:
            m.setattr(model, "forward", look)
            m.setattr(vae.first_stage_model, "decode", cancel if when == "decoding" else decode)
            with pytest.raises(mm.InterruptProcessingException):
                loop(sdxl, **SHORT)

    plain_is_as_before(sdxl, run)
    assert steps == (["unet"] if when == "sampling" else ["unet", "vae"])
