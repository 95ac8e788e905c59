"""Parity with the authors' pipeline, recorded on a tiny SDXL with a tiny real VAE."""

import pytest
import torch

from tests.diffusehigh.models import PIPELINE, prompts
from tests.goldens import golden

pytestmark = pytest.mark.comfy

SETTINGS = {
    "default": {},
    "from_noise": {"levels": 2, "sharpen_alpha": 0.5, "sharpen_kernel": 5},
    "plain": {"guided_steps": 0, "sharpen_alpha": 0.0},
    "short": {"steps": 30, "last_steps": 10, "guided_steps": 3, "cfg": 4.0, "sharpen_alpha": 2.0},
}
"""Of the cases: the node's inputs where they are not its defaults."""
AUTHORS_SIGMAS = [
    0.7789, 0.7247, 0.6726, 0.6225, 0.5741, 0.5270, 0.4810, 0.4358, 0.3910, 0.3462, 0.3006, 0.2531,
    0.2018, 0.1415, 0.0413, 0.0,
]  # fmt: skip


@pytest.fixture
def recorded():
    return golden("diffusehigh/pipeline.safetensors")


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "model_type"), [("sdxl", "EPS"), ("sd15", "V_PREDICTION")])
def test_the_authors_sixteen_noise_levels(node, recorded, name, model_type):
    from comfy.model_base import ModelType

    from tests.hidiffusion.models import base_model

    model = base_model(name, model_type=ModelType[model_type])
    found = node._sigmas(model, 50, 15, None)
    torch.testing.assert_close(found, recorded["sigmas_50"][-16:], rtol=0, atol=2e-5)
    torch.testing.assert_close(found, torch.tensor(AUTHORS_SIGMAS), rtol=0, atol=5.1e-5)


def run(loop, node, monkeypatch, model, case, recorded):
    """A case with the recorded noise and blur: its results, and [x, denoised] of every step."""
    stages = PIPELINE["cases"][case]["stages"]
    noises = iter([recorded[f"{case}.stage{i}.noise"] for i in range(len(stages))])
    blurs = iter([stage.get("blur_sigma", 1.0) for stage in stages])
    monkeypatch.setattr(node.comfy.sample, "prepare_noise", lambda *_: next(noises))
    monkeypatch.setattr(f"{node.Settings.__module__}.blur_sigma", lambda *_: next(blurs))
    watched, begin = [], node.comfy.sample.sample_custom

    def sample(model, *args, callback, **kwargs):
        watched.append([])

        def call(step, x0, x, total):
            watched[-1].append((x.clone(), x0.clone()))
            return callback(step, x0, x, total)

        return begin(model, *args, callback=call, **kwargs)

    monkeypatch.setattr(node.comfy.sample, "sample_custom", sample)
    scales = ", ".join("{1}x{0}".format(*stage["size"]) for stage in stages)
    first = "from_noise.base.image" if case == "from_noise" else "picture"
    image = recorded[first].movedim(1, -1)
    return (*loop(model, image, scales=scales, **SETTINGS[case]), watched)


@pytest.mark.parametrize("case", SETTINGS)
@torch.inference_mode()
def test_whole_runs(loop, node, sdxl, recorded, monkeypatch, case):
    picture, latent, watched = run(loop, node, monkeypatch, sdxl, case, recorded)
    guided, errors = SETTINGS[case].get("guided_steps", 5), []
    for stage, seen in enumerate(watched):
        expected = {k.split(".")[-1]: v for k, v in recorded.items() if f"{case}.stage{stage}" in k}
        start, x0 = seen[0]
        first = expected["denoised_guided" if guided else "denoised"][0]
        assert len(seen) == len(expected["next_latent"])
        if stage == 0:
            assert (start - expected["start_latent"]).abs().max() < 5e-5
            errors.append(relative(x0, first))
            assert errors[-1] < 2e-4
            assert (x0 - first).abs().max() < 1e-3
    final = expected["next_latent"][-1]
    found = sdxl.model.process_latent_in(latent["samples"])
    errors.append(relative(found, final))
    assert errors[-1] < 2e-3
    assert (found - final).abs().max() < 1e-2
    print(f"{case}: first step {errors[0]:.1e}, final latent {errors[-1]:.1e}")  # with -s
    if "image" in expected:
        assert (picture.movedim(-1, 1) - expected["image"]).abs().max() < 5e-3
    assert picture.shape[1:3] == tuple(PIPELINE["cases"][case]["stages"][-1]["size"])


@pytest.mark.parametrize("case", ["default", "short"])
@torch.inference_mode()
def test_single_steps(guide, node, sdxl, recorded, case):
    """Every evaluation from the recorded latent, through DiffuseHigh Guidance."""
    import comfy.samplers

    tensors = {k.split(".")[-1]: v for k, v in recorded.items() if f"{case}.stage0" in k}
    source = PIPELINE["cases"][case]["stages"][0]
    settings = {k: v for k, v in SETTINGS[case].items() if k in ("guided_steps", "sharpen_alpha")}
    blur = dict.fromkeys(("sharpen_sigma_min", "sharpen_sigma_max"), source["blur_sigma"])
    image = recorded["picture"].movedim(1, -1)
    model = guide(sdxl, image, **settings | blur)
    count = len(tensors["next_latent"])
    sigmas = node._sigmas(sdxl, SETTINGS[case].get("steps", 50), count, None)
    before = torch.cat([tensors["start_latent"][None], tensors["next_latent"][:-1]])
    found = []

    def follow(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(count):
            found.append(model(before[i], sigmas[i].expand(1), **extra_args))
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*prompts())
    guider.set_cfg(SETTINGS[case].get("cfg", 10.0))
    sampler = comfy.samplers.KSAMPLER(follow)
    zeros = torch.zeros_like(before[0])
    guider.sample(zeros, zeros, sampler, sigmas)
    expected = torch.cat(
        [tensors["denoised_guided"], tensors["denoised"][len(tensors["denoised_guided"]) :]]
    )
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    print(f"{case}: every step {max(errors):.1e}")
    assert max(errors) < 2e-4
