"""The prior, and the diffusion of what it leaves."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from infdit_core import InfDiTError, load_model, prepare, sample, upscale
from infdit_core.blocks.schedules import Full
from infdit_core.checkpoints.checkpoint import open_checkpoint
from infdit_core.checkpoints.convert import convert
from infdit_core.edm import preconditioning
from infdit_core.memory.planner import Workload, peak_bytes, prior_bytes
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import Prior, interpolate
from infdit_core.sampling import AUTO, AUTO_KEY, PRESETS, Preset, find_preset
from infdit_core.upscale import with_prior
from tests.goldens import ASKED, TINY, TINY_PRIOR, random_condition, random_tensors

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    tensors = {
        k: v * (0.1 if k.startswith("prior") else 1) for k, v in random_tensors(TINY_PRIOR).items()
    }
    save_file(tensors, path, ASKED)
    return path


@pytest.fixture(scope="module")
def model(path) -> InfDiT:
    return load_model(path)


def test_a_file_says_whether_it_has_one(model):
    assert model.config == TINY_PRIOR
    assert InfDiT(TINY, device="meta").prior is None
    assert (TINY_PRIOR.sigma_data, TINY_PRIOR.sigma_max, TINY.sigma_data, TINY.sigma_max) == (
        0.1,
        0.5,
        0.5,
        40,
    )


def test_bands_of_rows_give_the_whole_picture():
    prior, lr = Prior(8, 2).requires_grad_(False), torch.rand(2, 3, 37, 9)
    for band_px in (1, 100, 10**6):
        bands = prior.add_to(torch.ones(2, 3, 148, 36), lr, CPU, FP32, band_px)
        torch.testing.assert_close(bands, 1 + prior(lr), atol=1e-6, rtol=0)


def test_nothing_within_reach_is_left_out():
    """A pixel that changes moves what lies within `reach` of it, and nothing beyond."""
    prior, lr = Prior(8, 2).requires_grad_(False), torch.rand(1, 3, 40, 40)
    other = lr.clone()
    other[..., 20, 20] += 1
    rows = (prior(other) != prior(lr)).any(1)[0].any(1).nonzero().flatten() // 4
    assert (rows.min(), rows.max()) == (20 - prior.reach, 20 + prior.reach)


def test_it_denoises_what_the_prior_leaves(model):
    x, cond = random_condition(model, 2, 3)
    for sigma in (0.01, 0.3):
        c_skip, c_out, c_in, _ = preconditioning(torch.tensor(sigma), 0.1)
        raw = model(c_in * (x - cond.concat), torch.tensor([sigma]), cond)
        expected = cond.concat + c_skip * (x - cond.concat) + c_out * raw
        torch.testing.assert_close(model.denoise(x, sigma, cond), expected)


@pytest.mark.parametrize("factor", [4.0, 2.5])
def test_it_takes_the_place_of_interpolation(model, factor):
    image = torch.rand(1, 12, 20, 3)
    canvas = prepare(image, factor, block_px=32)
    enlarged = canvas.concat.clone()
    found = with_prior(canvas, model, CPU, FP32).concat
    if factor == 4.0:  # away from where the canvas goes on and the picture ends
        source = image.permute(0, 3, 1, 2) * 2 - 1
        expected = interpolate(source) + model.prior(source)
        torch.testing.assert_close(found[..., :20, :52], expected[..., :20, :52])
    assert found.shape == canvas.concat.shape
    assert not torch.equal(found, enlarged)
    assert torch.equal(
        upscale(image, factor, model=model, denoise=0, consistency=0),
        replace(canvas, concat=found).finish(found),
    )
    none = InfDiT(TINY, device="meta")
    assert with_prior(canvas, none, CPU, FP32) is canvas


def test_a_picture_that_is_not_enlarged_needs_none(model):
    canvas = prepare(torch.rand(1, 40, 40, 3), 1.0, block_px=32)
    assert with_prior(canvas, model, CPU, FP32) is canvas


def test_auto_is_what_the_file_asks_for(model):
    preset = find_preset(AUTO, model.metadata)
    assert preset == Preset("euler", 2, (1.0, 0.25), 1)
    assert preset.sigmas(1.0, 0.5).tolist() == [0.5, 0.125, 0]
    assert preset.sigmas(0.0, 0.5).tolist() == [0]
    assert find_preset(AUTO, {}) == PRESETS["exact"]
    image = torch.rand(1, 8, 8, 3)
    canvas = with_prior(prepare(image, block_px=32), model, CPU, FP32)
    noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.5, 0.125, 0])
    x = sample(model, canvas.condition(), levels, noise=noise, solver="euler", schedule=Full())
    expected = canvas.finish(canvas.consistent(x, 1))
    torch.testing.assert_close(upscale(image, model=model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"solver": "euler"}', '{"solver": "euler", "shares": []}',
     '{"solver": "euler", "shares": [1, 2]}', '{"solver": "euler", "shares": [0.5]}',
     '{"solver": "magic", "shares": [1]}', '{"solver": "euler", "shares": ["NaN"]}'],
)  # fmt: skip
def test_a_preset_that_cannot_be_used_is_named(text):
    with pytest.raises(InfDiTError, match=r"infdit\.preset cannot be used"):
        find_preset(AUTO, {AUTO_KEY: text})


def test_consistency_brings_the_input_back(model):
    image = torch.rand(1, 16, 16, 3)
    source, errors = image.permute(0, 3, 1, 2), []
    for times in (0, 1, 3):
        result = upscale(image, model=model, denoise=0, consistency=times).permute(0, 3, 1, 2)
        reduced = torch.nn.functional.interpolate(result, (16, 16), mode="bicubic", antialias=True)
        errors.append((reduced - source)[..., 4:-4, 4:-4].square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_conversion_keeps_the_preset(path, tmp_path):
    convert(path, tmp_path / "bf16.safetensors", torch.bfloat16)
    with open_checkpoint(tmp_path / "bf16.safetensors") as checkpoint:
        assert checkpoint.metadata[AUTO_KEY] == ASKED[AUTO_KEY]
    assert load_model(tmp_path / "bf16.safetensors").config == TINY_PRIOR


def test_its_memory_is_counted_and_bounded():
    wide = replace(TINY_PRIOR, prior_width=64)
    works = [Workload(wide, side, 4096, FP32, device="cpu") for side in (8192, 65536)]
    assert prior_bytes(works[0]) == prior_bytes(works[1]) > 0
    small = Workload(wide, 512, 512, FP32, device="cpu", pictures=0, weights=False)
    assert peak_bytes(small, Full()) >= prior_bytes(small)
    assert prior_bytes(replace(small, config=TINY)) == 0
