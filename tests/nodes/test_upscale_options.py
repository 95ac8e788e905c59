"""What Inf-DiT Upscale offers beside its preset: size, denoise, colours, samplers, masks."""

import importlib

import pytest
import torch

from tests.comfy import STEPS

pytestmark = pytest.mark.comfy

SAMPLERS = ["euler", "heun", "dpmpp_2m", "deis", "ipndm", "uni_pc", "dpmpp_2m_sde"]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 10, 12, 3, generator=torch.Generator().manual_seed(0))


def sampler_object(name: str):
    return importlib.import_module("comfy.samplers").sampler_object(name)


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((10, 13), 33, (25, 33)),
        ((13, 10), 40, (40, 31)),
        ((1, 1), 7, (7, 7)),
        ((3, 2), 41, (41, 27)),
    ],
)
def test_the_longest_edge_comes_out(load, upscale, comfy, size, edge, expected):
    picture = torch.rand(1, *size, 3)
    model = load("tiny")[0]
    assert upscale(model, picture, longest_edge=edge, steps=1).shape == (1, *expected, 3)
    canvas = comfy.nodes["InfDiTConditioning"].execute(model, picture, 4.0, longest_edge=edge)
    assert (canvas.args[2].height, canvas.args[2].width) == expected


def test_a_longest_edge_of_the_picture_times_four_is_the_factor_four(load, upscale, image):
    model = load("tiny")[0]
    assert torch.equal(upscale(model, image, 1.0, longest_edge=48), upscale(model, image, 4.0))


def test_denoise_takes_fewer_evaluations_and_stays_closer(load, upscale, image, evaluations):
    model, found = load("tiny")[0], {}
    for denoise in (0.0, 0.25, 0.5, 1.0):
        evaluations.clear()
        found[denoise] = upscale(model, image, denoise=denoise, steps=8), len(evaluations)
    assert [count for _, count in found.values()] == [0, 3, 7, 15]
    enlarged = found[0.0][0]
    away = [(picture - enlarged).abs().mean() for picture, _ in found.values()]
    assert away == sorted(away)
    assert torch.equal(found[1.0][0], upscale(model, image, steps=8))


def test_without_evaluations_the_picture_is_enlarged_by_bicubic(load, upscale, comfy, image):
    canvas = comfy.module("infdit_core.pictures.prepare").prepare(image, 2.0, block_px=32)
    enlarged = canvas.finish(canvas.concat)
    assert torch.equal(upscale(load("tiny")[0], image, 2.0, denoise=0.0), enlarged)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("method", ["wavelet", "adain", "lab"])
def test_colours_are_fixed_after_the_last_pass(comfy, load, upscale, image, method, channels):
    model = load("tiny")[0]
    picture = torch.cat([image, image[..., :1]], -1)[..., :channels]
    fix = comfy.module("infdit_core.pictures.colour_fix").fix_colours
    plain = upscale(model, picture, 5.0, steps=2)
    fixed = upscale(model, picture, 5.0, steps=2, colour_fix=method)
    assert torch.equal(fixed, fix(plain, picture, method))
    assert not torch.equal(fixed, plain)


def test_decode_fixes_colours_like_upscale(comfy, load, upscale, image):
    canvas = comfy.nodes["InfDiTConditioning"].execute(load("tiny")[0], image, 4.0).args[2]
    fix = comfy.module("infdit_core.pictures.colour_fix").fix_colours
    noisy = {"samples": canvas.concat + 0.2}
    decoded, mask = comfy.nodes["InfDiTDecode"].execute(noisy, canvas, "adain").args
    assert torch.equal(decoded, fix(canvas.finish(noisy["samples"]), image, "adain"))
    assert mask.shape == decoded.shape[:3]
    two = {"samples": noisy["samples"].repeat(2, 1, 1, 1)}
    assert comfy.nodes["InfDiTDecode"].execute(two, canvas).args[0].shape[0] == 2
    with pytest.raises(ValueError, match="Inf-DiT Decode: expected the LATENT of the sampler"):
        comfy.nodes["InfDiTDecode"].execute(two, canvas, "adain")


@pytest.mark.parametrize("name", SAMPLERS)
def test_core_samplers_find_the_preset_s_picture(load, upscale, image, name):
    model = load("tiny")[0]
    exact = upscale(model, image, steps=20)
    found = upscale(model, image, steps=20, sampler=sampler_object(name))
    if not name.endswith("_sde"):  # which adds noise of its own: its picture is another one
        assert (found - exact).square().mean().sqrt() < 0.06
    pair = torch.cat([1 - image, image])
    again = upscale(model, pair, steps=20, sampler=sampler_object(name))
    torch.testing.assert_close(again[1], found[0])


def test_heun_of_core_is_the_preset(load, upscale, image):
    model = load("tiny")[0]
    by_core = upscale(model, image, steps=6, sampler=sampler_object("heun"))
    torch.testing.assert_close(by_core, upscale(model, image, steps=6), atol=1e-4, rtol=0)


def test_sigmas_take_the_place_of_steps_and_denoise(comfy, load, upscale, image, evaluations):
    model = load("tiny")[0]
    edm = comfy.module("infdit_core.edm")
    expected = upscale(model, image, steps=5)
    evaluations.clear()
    found = upscale(model, image, steps=50, denoise=0.1, sigmas=edm.edm_sigmas(5))
    assert len(evaluations) == 9
    assert torch.equal(found, expected)
    partly = upscale(model, image, sigmas=edm.edm_sigmas(8)[4:])
    assert not torch.equal(partly, expected)


def test_a_bad_picture_at_the_end_of_a_batch_or_sigmas_are_refused_before_any_work(
    load, upscale, image, evaluations
):
    model, batch = load("tiny")[0], torch.cat([image, image * float("nan")])
    with pytest.raises(ValueError, match=r"Inf-DiT Upscale: expected finite pixels in 0\.\.1"):
        upscale(model, batch)
    with pytest.raises(ValueError, match="Inf-DiT Upscale: expected sigmas that fall"):
        upscale(model, image, sigmas=torch.tensor([1.0, 2.0, 0.0]))
    with pytest.raises(ValueError, match=r"expected sigmas that end in 0, .* got 5 at the end"):
        upscale(model, image, sigmas=torch.tensor([40.0, 5.0]))
    assert not evaluations


def test_the_mask_is_one_minus_alpha(comfy, load, image):
    model, node = load("tiny")[0], comfy.nodes["InfDiTSampler"]
    alpha = torch.rand(2, 10, 12, 1)
    pictures = torch.cat([image.expand(2, -1, -1, -1), alpha], -1)
    picture, mask = node.execute(model, pictures, 2.0, 0, 1).args
    assert torch.equal(mask, 1 - picture[..., 3])
    assert mask.shape == (2, 20, 24)
    picture, mask = node.execute(model, image, 2.0, 0, 1).args
    assert torch.equal(mask, torch.zeros(1, 20, 24))


@pytest.mark.parametrize("name", ["euler", "heun", "uni_pc"])
def test_the_bar_of_a_foreign_sampler_ends_full(load, upscale, image, bar, name):
    upscale(load("tiny")[0], torch.cat([image, image]), sampler=sampler_object(name))
    values = [value for value, _, _ in bar]
    assert values == sorted(values)
    assert all(value <= total for value, total, _ in bar)
    assert bar[-1][0] / bar[-1][1] > 0.85
    assert sum(preview is not None for _, _, preview in bar) >= 2 * STEPS - 2


def test_another_upscaler_s_picture_is_refined(comfy, load, upscale, image):
    model, start = load("tiny")[0], torch.rand(1, 20, 24, 3)
    kept = upscale(model, image, denoise=0.0, start_image=start)
    torch.testing.assert_close(kept, start, atol=1e-6, rtol=0)
    sampler = comfy.module("infdit_core.upscale")
    presets = comfy.module("infdit_core.sampling").PRESETS
    network = model.model.diffusion_model.net
    draw = sampler.Sampler(network, presets["fast"], 5, 0.5)
    expected = sampler.upscale(image, 2.0, draw, start=start)
    found = upscale(model, image, seed=5, preset="fast", denoise=0.5, start_image=start)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="Inf-DiT Upscale: expected a picture to start from in"):
        upscale(model, image, start_image=start[:, :, :20])


def test_a_picture_that_goes_on_around(comfy, load, upscale, image):
    model = load("tiny")[0]
    engine = comfy.module("infdit_core.upscale")
    presets = comfy.module("infdit_core.sampling").PRESETS
    draw = engine.Sampler(model.model.diffusion_model.net, presets["fast"], 5)
    for wrap in ("horizontal", "both"):
        expected = engine.upscale(image, 2.0, draw, wrap=wrap)
        found = upscale(model, image, seed=5, preset="fast", wrap=wrap)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    restless = upscale(model, image, wrap="both", sampler=sampler_object("dpmpp_2m_sde"))
    assert restless.shape == expected.shape


def test_a_wrapper_that_moves_the_noisy_picture_alone_is_refused(load, upscale, image, evaluations):
    tiled = load("tiny")[0].clone()
    tiled.set_model_unet_function_wrapper(lambda apply, args: None)
    with pytest.raises(ValueError, match="Inf-DiT Upscale: expected a model without a wrapper"):
        upscale(tiled, image)
    assert not evaluations


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((10, 13), {"size_by": "megapixels", "megapixels": 0.01}, (90, 117)),
        ((10, 12), {"size_by": "width and height", "width": 40, "height": 90}, (33, 40)),
        ((12, 10), {"size_by": "width and height", "width": 40, "height": 30}, (30, 25)),
        ((10, 12), {"size_by": "factor or longest edge", "width": 99, "upscale_by": 1.5}, (15, 18)),
        ((10, 12), {"longest_edge": 5}, (10, 12)),
        ((10, 12), {"size_by": "width and height", "width": 40, "height": 5}, (10, 12)),
        ((120, 130), {"size_by": "megapixels", "megapixels": 0.01}, (120, 130)),
    ],
)
def test_the_size_that_was_asked_for_and_never_less(
    load, upscale, comfy, caplog, size, asked, expected
):
    picture, model = torch.rand(1, *size, 3), load("tiny")[0]
    assert upscale(model, picture, **asked, denoise=0.0).shape == (1, *expected, 3)
    asked = {"upscale_by": 4.0} | asked
    canvas = comfy.nodes["InfDiTConditioning"].execute(model, picture, **asked).args[2]
    assert (canvas.height, canvas.width) == expected
    shrunk = expected == size
    assert (
        f"would shrink the picture; it keeps its {size[1]}×{size[0]} px" in caplog.text
    ) == shrunk


def test_pictures_of_a_batch_share_their_noise_unless_told(load, upscale, image):
    model, frames = load("tiny")[0], image.expand(2, -1, -1, -1)
    same = upscale(model, frames, 5.0, seed=2**64 - 1)
    assert torch.equal(same[0], same[1])
    own = upscale(model, frames, 5.0, seed=2**64 - 1, same_noise=False)
    assert torch.equal(own[0], same[0])
    torch.testing.assert_close(own[1:], upscale(model, image, 5.0, seed=0))


def test_conditioning_gives_frames_one_noise(comfy, load, image):
    """By core's batch_index, which KSampler and SamplerCustomAdvanced draw their noise by."""
    model, frames, found = load("tiny")[0], image.expand(2, -1, -1, -1), {}
    core = importlib.import_module("nodes")
    for same in (False, True):
        cond, latent, _ = (
            comfy.nodes["InfDiTConditioning"].execute(model, frames, 4.0, same_noise=same).args
        )
        sampled = core.common_ksampler(model, 5, 2, 1.0, "euler", "karras", cond, cond, latent)
        found[same] = sampled[0]["samples"]
    assert not torch.allclose(found[False][0], found[False][1], atol=1e-2)
    torch.testing.assert_close(found[True][0], found[True][1])


def test_a_mask_is_that_of_core(comfy, load, upscale, image):
    model, start = load("tiny")[0], torch.rand(1, 20, 24, 3)
    engine = comfy.module("infdit_core.upscale")
    presets = comfy.module("infdit_core.sampling").PRESETS
    draw = engine.Sampler(model.model.diffusion_model.net, presets["fast"], 5)
    mask = torch.rand(1, 10, 12)
    mask[:, 5:] = 0
    expected = engine.upscale(image, 2.0, draw, start=start, mask=mask)
    settings = {"seed": 5, "preset": "fast", "start_image": start, "mask": mask}
    found = upscale(model, image, **settings)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, 11:], start[:, 11:], atol=2e-6, rtol=0)
    differential = importlib.import_module("comfy_extras.nodes_differential_diffusion")
    later = differential.DifferentialDiffusion.execute(model).args[0]
    by_strength = upscale(later, image, **settings)
    assert not torch.allclose(by_strength, found, atol=1e-2)
    # the node of core takes the lowest noise level off everywhere
    torch.testing.assert_close(by_strength[:, 11:], start[:, 11:], atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="Inf-DiT Upscale: expected a mask in the shape"):
        upscale(model, image, mask=torch.eye(20)[None])


@pytest.mark.parametrize("name", ["tiny", "prior"])
def test_the_advanced_way_starts_wraps_and_masks_as_upscale_does(comfy, load, upscale, image, name):
    """A start is seen with denoise below 1, as KSampler has it: the end of a longer schedule."""
    model, core = load(name)[0], importlib.import_module("nodes")
    mask = torch.zeros(1, 10, 12)
    mask[:, :4, :7] = 1
    options = {"start_image": torch.rand(1, 20, 24, 3), "wrap": "horizontal", "mask": mask}
    cond, latent, canvas = (
        comfy.nodes["InfDiTConditioning"].execute(model, image, 2.0, **options).args
    )
    sampled = core.common_ksampler(
        model, 5, 4, 1.0, "heun", "karras", cond, cond, latent, denoise=0.5
    )[0]
    sigmas = importlib.import_module("comfy.samplers").calculate_sigmas(
        model.get_model_object("model_sampling"), "karras", 8
    )[-5:]
    decode = comfy.nodes["InfDiTDecode"].execute
    for fix in ("none", "adain"):
        found = decode(sampled, canvas, fix).args[0]
        settings = {"sigmas": sigmas, "preset": "exact", "colour_fix": fix}
        expected = upscale(model, image, 2.0, 5, **options, **settings)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[:, 9:], options["start_image"][:, 9:], atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="Inf-DiT Decode: expected colour_fix none, adain or lab"):
        decode(sampled, canvas, "wavelet")
    pair = image.expand(2, -1, -1, -1)
    _, latent, _ = comfy.nodes["InfDiTConditioning"].execute(model, pair, 2.0, **options).args
    assert latent["samples"].shape[0] == 2
    with pytest.raises(ValueError, match="Inf-DiT Conditioning: expected a picture to start from"):
        comfy.nodes["InfDiTConditioning"].execute(model, image, 2.0, start_image=pair[:1, :, :9])
