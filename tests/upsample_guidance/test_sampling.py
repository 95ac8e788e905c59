"""Upsample Guidance under ComfyUI's samplers: what is called when, and the model afterwards."""

import logging

import pytest
import torch

from tests.hidiffusion.models import base_model, forward, prompts, sample
from tests.upsample_guidance.models import conditions, evaluate, watch

pytestmark = pytest.mark.comfy

SIZE, LOW = (24, 32), (12, 16)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "dpmpp_2m", "uni_pc"])
def test_the_model_is_called_twice_in_the_window_and_once_outside(sdxl, apply, sampler):
    plain = sdxl.clone()
    once, seen = watch(plain), watch(patched := apply(sdxl))
    expected, result = (sample(m, steps=6, sampler=sampler) for m in (plain, patched))
    assert result.isfinite().all()
    assert not torch.equal(result, expected)
    sampling = sdxl.get_model_object("model_sampling")
    calls = []
    for _, sigma, _ in once:
        if float(sampling.timestep(torch.tensor(sigma))) > 400:
            calls.append((LOW, pytest.approx(sigma / 2), True))
        calls.append((SIZE, pytest.approx(sigma), False))
    assert len(once) < len(calls) < 2 * len(once)
    assert seen == calls  # the plain call last: patches that remember one remember that


@pytest.mark.parametrize(
    "settings", [{"theta": 0.0}, {"eta": 0.0}, {"scale": "auto"}], ids=lambda s: next(iter(s))
)
def test_nothing_to_guide_is_the_plain_model_bit_for_bit(tiny, apply, settings):
    off = apply(tiny, **settings)
    seen = watch(off)
    assert torch.equal(sample(off, steps=4), sample(tiny, steps=4))
    assert len(seen) == 4


def test_it_leaves_the_plain_model_alone(tiny, apply):
    before, plain = forward(tiny), sample(tiny, steps=4)
    options = repr(tiny.model_options)
    patched = apply(tiny)
    result = sample(patched, steps=4)
    assert (result - plain).norm() > 0.05 * plain.norm()
    assert torch.equal(sample(patched, steps=4), result), "reproducible"
    assert torch.equal(forward(tiny), before)
    assert torch.equal(sample(tiny, steps=4), plain)
    assert repr(tiny.model_options) == options
    assert not tiny.wrappers


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("call", [3, 4])
def test_the_plain_model_is_the_same_after_an_error_or_a_cancel(
    sdxl, apply, cancel, call, monkeypatch
):
    from comfy.model_management import InterruptProcessingException

    before, plain = forward(sdxl), sample(sdxl, steps=3)
    error = InterruptProcessingException if cancel else RuntimeError
    patched, calls = apply(sdxl), []
    convolution = sdxl.model.diffusion_model.input_blocks[6][0].op
    original = convolution.forward

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:  # of a low call, or of the plain one after it
            raise error("in the convolution")
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(convolution, "forward", fail)
        with pytest.raises(error):
            sample(patched, steps=3)
    assert torch.equal(forward(sdxl), before)
    assert torch.equal(sample(sdxl, steps=3), plain)


def test_split_prompts_give_the_result_of_joined_ones(sdxl, apply, monkeypatch):
    patched = apply(sdxl)
    joined = sample(patched, steps=4)
    monkeypatch.setattr(sdxl.model, "memory_required", lambda *args, **kwargs: 1e30)
    seen = watch(patched)
    split = sample(patched, steps=4)
    assert len(seen) == 12, "two guided steps of four"
    assert (split - joined).norm() < 1e-4 * joined.norm()


def test_settings_matter(sdxl, apply):
    results = [
        sample(apply(sdxl, **settings), steps=3)
        for settings in ({}, {"theta": 1.2}, {"eta": 0.4}, {"ramp": 1.0}, {"scale": "3"})
    ]
    for i in range(len(results)):
        for j in range(i):
            assert not torch.equal(results[i], results[j]), (i, j)


def test_every_picture_of_a_batch_has_its_own_noise_level(sdxl, apply):
    patched, conds = apply(sdxl), conditions("sdxl", 2)
    x, sigmas = torch.randn(2, 4, *SIZE), torch.tensor([5.0, 0.5])
    options = {"wrappers": patched.wrappers, "sigmas": sigmas}
    with torch.no_grad():
        both = patched.model.apply_model(x, sigmas, **conds, transformer_options=options)
    for i in (0, 1):
        one = {key: value[i : i + 1] for key, value in conds.items()}
        expected = evaluate(patched, x[i : i + 1], sigmas[i], one)
        torch.testing.assert_close(both[i : i + 1], expected, rtol=1e-4, atol=1e-3)
    plain = evaluate(sdxl, x, 0.5, conds)[1]
    torch.testing.assert_close(both[1], plain, rtol=1e-4, atol=1e-4)


def test_rows_that_are_left_over_are_those_of_the_plain_model(sdxl, apply):
    x, conds = 5 * torch.randn(1, 4, 25, 38), conditions("sdxl", 1)
    found, plain = (evaluate(m, x, 5.0, conds) for m in (apply(sdxl, scale="3"), sdxl))
    assert torch.equal(found[..., 24:, :], plain[..., 24:, :])
    assert torch.equal(found[..., [0, 37]], plain[..., [0, 37]])
    assert (found != plain)[..., :24, 1:37].float().mean() > 0.99
    tile = x[..., :2, :]
    assert torch.equal(*(evaluate(m, tile, 5.0, conds) for m in (apply(sdxl, scale="3"), sdxl)))


@pytest.fixture
def native_16(comfy, monkeypatch):
    """The tiny model's native side is 16."""
    monkeypatch.setattr(comfy.module("nodes.upsample_guidance.node"), "native_side", lambda _: 16)


def test_areas_and_tiles_take_m_from_the_whole_latent(sdxl, apply, native_16):
    patched = apply(sdxl, scale="auto")
    positive, negative = (
        [[context, values | extra]]
        for (context, values), extra in zip(
            (pair[0] for pair in prompts()), ({"area": (16, 16, 8, 8)}, {}), strict=True
        )
    )
    from nodes import common_ksampler

    seen = watch(patched)
    latent = {"samples": torch.zeros(1, 4, 32, 32)}
    common_ksampler(patched, 3, 1, 4.0, "euler", "normal", positive, negative, latent)
    assert {size for size, _, low in seen if low} == {(8, 8), (16, 16)}

    def tiles(apply_model, call):
        x, c = call["input"], call["c"]
        return torch.cat([apply_model(part, call["timestep"], **c) for part in x.chunk(2, -1)], -1)

    tiled = apply(sdxl, scale="auto")
    tiled.set_model_unet_function_wrapper(tiles)
    seen = watch(tiled)
    sample(tiled, steps=1, size=(32, 32))
    assert [size for size, *_ in seen] == [(16, 8), (32, 16)] * 2
    # Outside of a run there is nothing but the latent at hand.
    seen.clear()
    evaluate(tiled, torch.randn(1, 4, 32, 32), 5.0, conditions("sdxl", 1))
    assert [size for size, *_ in seen] == [(16, 16), (32, 32)]


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"scale": "auto"}, (17, 17), "near the model's native 16×16"),
        ({"scale": "4"}, (24, 32), "leaves 8×6, less than half of the model's native 16×16"),
    ],
)
def test_sizes_that_make_no_sense_are_said(sdxl, apply, native_16, caplog, settings, size, message):
    with caplog.at_level(logging.WARNING):
        sample(apply(sdxl, **settings), steps=1, size=size)
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sample(apply(sdxl, scale="auto"), steps=4, size=(32, 32))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "scale 2, latent 32×32, low 16×16): 2 of 4 steps are guided" in caplog.text


def test_masks_and_pictures_beside_the_latent_are_scaled(comfy, apply):
    from comfy.patcher_extension import WrappersMP

    model = base_model("sdxl", in_channels=9)
    model.model.set_inpaint()
    patched, inputs = apply(model), []

    def look(executor, x, *args, **kwargs):
        inputs.append(x)
        return torch.zeros_like(x[:, :4])

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    mask, image = (torch.rand(1, 1, *SIZE) > 0.5).float(), torch.randn(1, 4, *SIZE)
    conds = conditions("sdxl", 1) | {"c_concat": torch.cat([mask, image], 1)}
    evaluate(patched, torch.randn(1, 4, *SIZE), 5.0, conds)
    low, high = inputs
    assert torch.equal(high[:, 4:], conds["c_concat"])
    assert torch.equal(low[:, 4:5], mask[:, :, ::2, ::2])
    torch.testing.assert_close(low[:, 5:], torch.nn.functional.avg_pool2d(image, 2))


def test_sdxl_is_told_the_size_of_the_small_picture(comfy):
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from comfy.model_base import SDXL, SDXLRefiner

    divide = comfy.module("nodes.upsample_guidance.rules").divide_lengths
    sizes = {"height": 2048, "width": 3072, "crop_h": 64, "crop_w": 0}
    targets = {"target_height": 8192, "target_width": 1024}
    cases = (SDXL, 6, sizes | targets, {}), (SDXLRefiner, 4, sizes, {"aesthetic_score": 6.0})
    for kind, lengths, told, score in cases:
        model = kind.__new__(kind)
        torch.nn.Module.__init__(model)
        model.embedder, model.noise_augmentor = Timestep(256), None
        pooled = {"pooled_output": torch.randn(2, 1280)}
        for m in (2, 4):
            y = model.encode_adm(**pooled, **told, **score)
            expected = model.encode_adm(**pooled, **{k: v / m for k, v in told.items()}, **score)
            patch = comfy.module("nodes.upsample_guidance.node").Patch(128, None, None, True)
            found = patch._low_conds(model, m, {"y": y})["y"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert torch.equal(divide(y, 6 if lengths == 6 else 5, lengths, 1), y)
