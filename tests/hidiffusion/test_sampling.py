"""HiDiffusion under ComfyUI's KSampler: the steps, the shifts, and the model afterwards."""

from collections import defaultdict

import pytest
import torch

from tests.hidiffusion.models import forward, prompts, sample, sample_stage, watch

pytestmark = pytest.mark.comfy


def test_it_samples_and_leaves_the_plain_model_alone(tiny, apply):
    before, plain = forward(tiny), sample(tiny)
    state = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    options = repr(tiny.model_options)
    patched = apply(tiny, rau_net="aggressive")
    result = sample(patched)
    assert result.isfinite().all()
    assert (result - plain).norm() > 0.05 * plain.norm()
    assert torch.equal(sample(patched), result), "reproducible"
    assert torch.equal(forward(tiny), before)
    assert torch.equal(sample(tiny), plain)
    assert repr(tiny.model_options) == options
    assert not tiny.wrappers
    assert all(torch.equal(v, state[k]) for k, v in tiny.model.state_dict().items())


@pytest.mark.parametrize("cancel", [False, True])
def test_the_plain_model_is_the_same_after_an_error_or_a_cancel(tiny, apply, cancel, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    before, plain = forward(tiny), sample(tiny, steps=4)
    error = InterruptProcessingException if cancel else RuntimeError
    patched = apply(tiny, rau_net="aggressive", preset="custom", t1=1.0, t2=1.0)
    down = tiny.model.diffusion_model.input_blocks[6][0].op
    original, calls = down.forward, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error("in the convolution")
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(down, "forward", fail)
        with pytest.raises(error, match=None if cancel else "in the convolution"):
            sample(patched, steps=8)
    assert torch.equal(forward(tiny), before)
    assert torch.equal(sample(tiny, steps=4), plain)


def test_off_is_the_plain_model_bit_for_bit(tiny, apply):
    off = apply(tiny, rau_net="off", window_attention=False)
    assert torch.equal(sample(off), sample(tiny))
    native = apply(tiny, window_attention=False)
    assert torch.equal(sample(native), sample(tiny)), "auto leaves native sizes alone"


@pytest.mark.parametrize("t2", [0.0, 1.0])
@pytest.mark.parametrize("size", [(33, 47), (38, 52), (31, 16)])
def test_any_size_comes_back_and_is_windowed(hi, tiny, apply, size, t2, monkeypatch):
    split, windowed = hi.ShiftedWindows.split, []

    def count(windows, tokens):
        windowed.append(tokens.shape[1])
        return split(windows, tokens)

    monkeypatch.setattr(hi.ShiftedWindows, "split", count)
    patched = apply(tiny, rau_net="normal", preset="custom", t1=1.0, t2=t2)
    seen = watch(patched)
    result = sample(patched, steps=2, size=size)
    assert result.shape == (1, 4, *size)
    assert result.isfinite().all()
    assert len(windowed) == sum(len(s[3]) for s in seen) > 0, "no layer was left out"


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "uni_pc"]
)
def test_the_steps_are_right_for_every_sampler(sdxl, apply, sampler):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    sample(patched, steps=10, sampler=sampler)
    windows = defaultdict(set)
    for sigma, rad, pool, order, _, levels in seen:
        assert len(levels) == 11
        step = max(i for i in range(10) if levels[i] >= sigma * 0.9999)
        assert (rad, pool) == (step == 0, 1 <= step <= 3), f"sigma {sigma}, step {step}"
        windows[step].add(order["output", 5, 0])
    assert sorted(windows) == list(range(10)), "every step was seen"
    assert all(len(orders) == 1 for orders in windows.values()), "one shift in a step"
    assert len({order for orders in windows.values() for order in orders}) == 4


def test_split_prompts_get_the_windows_of_joined_ones(sdxl, apply, monkeypatch):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    joined = sample(patched, steps=6)
    together, seen[:] = list(seen), []
    monkeypatch.setattr(sdxl.model, "memory_required", lambda *args, **kwargs: 1e30)
    split = sample(patched, steps=6)
    assert [s[4] for s in together] == [2] * 6
    assert [s[4] for s in seen] == [1] * 12
    assert seen[::2] == seen[1::2]
    assert [s[:4] for s in seen[::2]] == [s[:4] for s in together]
    assert (split - joined).norm() < 1e-4 * joined.norm()


def test_seed_and_settings_matter(sdxl, apply):
    size = {"size": (64, 64), "steps": 4}
    results = [
        sample(apply(sdxl, **settings), **size)
        for settings in (
            {"rau_net": "off"},
            {"rau_net": "off", "seed": 2**64 - 1},
            {"rau_net": "normal"},
            {"rau_net": "aggressive"},
            {"rau_net": "off", "window_attention": False},
            {"rau_net": "aggressive", "preset": "custom", "aggressive_ratio": 0.5, "t1": 0.8},
            {"rau_net": "normal", "preset": "SDXL-Turbo"},
        )
    ]
    assert torch.equal(results[2], results[3]), "4 steps are too few for the aggressive phase"
    for i in range(7):
        for j in range(i):
            if (i, j) != (3, 2):
                assert not torch.equal(results[i], results[j]), (i, j)


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_the_stages_of_ksampler_advanced_share_one_schedule(sdxl, apply, scheduler):
    settings = {"rau_net": "aggressive", "window_attention": False}
    staged, whole = apply(sdxl, **settings), apply(sdxl, timing="sigma percent", **settings)
    seen, once = watch(staged), watch(whole)
    expected = sample(whole, steps=25, scheduler=scheduler)
    latent = torch.zeros(1, 4, 24, 32)
    for start, end in ((0, 3), (3, 7), (7, 25)):
        latent = sample_stage(staged, 25, start, end, latent, scheduler)
    assert [s[:3] for s in seen] == [s[:3] for s in once]
    # Every stage scales the latent to the VAE's numbers and back.
    assert (latent - expected).norm() < 1e-4 * expected.norm()
    if scheduler == "normal":  # its steps lie evenly along the noise levels: both timings agree
        assert [s[1] for s in once] == [i < 4 for i in range(25)]
        assert [s[2] for s in once] == [4 <= i < 10 for i in range(25)]


def test_image_to_image_counts_its_own_steps(sdxl, apply):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    sample(patched, steps=10, denoise=0.5)
    assert [s[1] for s in seen] == [i < 1 for i in range(10)]
    assert [s[2] for s in seen] == [1 <= i < 4 for i in range(10)]


def test_sigma_percent_goes_by_the_noise(sdxl, apply):
    sampling = sdxl.get_model_object("model_sampling")
    patched = apply(sdxl, rau_net="aggressive", timing="sigma percent")
    seen = watch(patched)
    sample(patched, steps=20, scheduler="karras")
    for sigma, rad, pool, *_ in seen:
        assert rad == (sigma > sampling.percent_to_sigma(0.16))
        assert pool == (sampling.percent_to_sigma(0.16) >= sigma > sampling.percent_to_sigma(0.4))
    assert sum(s[1] for s in seen) != 3, "Karras spends its steps elsewhere"


def test_an_evaluation_outside_a_sampler_is_timed_by_noise(sdxl, apply):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    options = patched.model_options["transformer_options"] | {"wrappers": patched.wrappers}
    positive, _ = prompts()
    for sigma in (14.0, 5.0, 0.5):
        sdxl.model.apply_model(
            torch.randn(1, 4, 16, 16),
            torch.tensor([sigma]),
            c_crossattn=positive[0][0],
            y=positive[0][1]["pooled_output"],
            transformer_options=options | {"sigmas": torch.tensor([sigma])},
        )
    assert [s[1:3] for s in seen] == [(True, False), (False, True), (False, False)]
