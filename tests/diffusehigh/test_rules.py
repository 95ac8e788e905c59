"""Wavelets, sharpening, sizes and times: against the authors' libraries, and by their meaning."""

import pytest
import torch

from tests.goldens import golden, golden_marks

pytestmark = pytest.mark.comfy

FILE = "diffusehigh/functions.safetensors"
SWAPS = [
    pytest.param(key, marks=golden_marks(FILE, key))
    for key in golden(FILE)
    if key.startswith("swap_") and key.endswith("_symmetric")
]


@pytest.mark.parametrize("case", SWAPS)
def test_the_low_band_is_that_of_the_authors_library(rules, case):
    tensors = golden(FILE)
    _, size, wavelet, levels, _ = case.split("_")
    image, reference = tensors[f"image_{size}"], tensors[f"reference_{size}"]
    low = rules.low_band(reference, wavelet, int(levels))
    if (name := f"LLref_{case[5:]}") in tensors:
        torch.testing.assert_close(low[:, :1], tensors[name], rtol=0, atol=1e-5)
    found = rules.swap_low_band(image, low, wavelet, int(levels))
    # At odd sizes the library returns one row and column more.
    expected = tensors[case][..., : image.shape[-2], : image.shape[-1]]
    channels = expected.shape[1]  # of some cases one is recorded
    assert (expected - image[:, :channels]).abs().max() > 0.02
    torch.testing.assert_close(found[:, :channels], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wavelet", ["db4", "haar", "db2", "sym4"])
@pytest.mark.parametrize("size", [(40, 56), (41, 39), (9, 30)])
def test_what_a_swap_does(rules, wavelet, size):
    x, other = torch.rand(2, 3, *size, dtype=torch.float64), torch.rand(2, 3, *size).double()
    for levels in range(1, min(3, rules.most_levels(size, wavelet)) + 1):
        low = rules.low_band(other, wavelet, levels)
        swapped = rules.swap_low_band(x, low, wavelet, levels)
        if levels == 1 and min(size) > 9:  # mirrored borders are not kept exactly
            inside = (..., slice(4, -4), slice(4, -4))
            found = rules.low_band(swapped, wavelet, 1)
            torch.testing.assert_close(found[inside], low[inside], rtol=0, atol=1e-9)
        assert torch.equal(rules.swap_low_band(x, low, wavelet, levels, 0.0), x)
        own = rules.low_band(x, wavelet, levels)
        assert torch.equal(rules.swap_low_band(x, own, wavelet, levels), x)
        constant = torch.full_like(x, 0.7)
        torch.testing.assert_close(
            rules.low_band(constant, wavelet, levels), torch.full_like(low, 0.7 * 2**levels)
        )
        half = rules.swap_low_band(x, low, wavelet, levels, 0.5)
        torch.testing.assert_close(half, (x + swapped) / 2)


def test_how_many_levels_fit(rules):
    assert [rules.most_levels((n, 99), "db4") for n in (7, 8, 9, 99)] == [0, 1, 2, 7]
    assert rules.most_levels((8, 8), "haar") == 3


@pytest.mark.parametrize(
    ("kernel", "sigma", "alpha"),
    [(3, "0.1", "1.0"), (3, "0.7", "1.0"), (3, "1.3", "0.5"), (5, "0.7", "2.0")],
)
def test_sharpening_is_the_authors(rules, kernel, sigma, alpha):
    tensors = golden(FILE)
    expected = tensors[f"sharpen_k{kernel}_s{sigma}_a{alpha}"]
    x = tensors["sharpen_input"]
    found = rules.sharpen(x, float(alpha), kernel, float(sigma))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    assert rules.sharpen(x, 0.0, kernel, float(sigma)) is x


@pytest.mark.parametrize("size", [(24, 30), (61, 99)])
def test_enlarging_is_the_authors(rules, size):
    tensors = golden(FILE)
    found = rules.enlarge(tensors["sharpen_input"], size)
    assert torch.equal(found, tensors[f"bicubic_{size[0]}x{size[1]}"])
    assert rules.enlarge(found, size) is found


def test_the_blur_is_drawn_for_every_stage_without_global_state(rules):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [rules.blur_sigma(seed, stage, 0.1, 2.0) for seed in (0, 1) for stage in range(200)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn)) == len(drawn)
    assert 0.1 <= min(drawn) < 0.15
    assert 1.95 < max(drawn) <= 2.0
    assert rules.blur_sigma(2**64 - 1, 1, 0.7, 0.7) == 0.7


def test_strengths_fade(rules):
    assert rules.strengths(4, 0.5, 0.0) == [0.5] * 4
    assert rules.strengths(4, 1.0, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert rules.strengths(0, 1.0, 1.0) == []


def test_sizes_of_the_stages(rules):
    assert rules.stage_sizes("1.5, 2.0", (1024, 1024), 8) == [(1536, 1536), (2048, 2048)]
    assert rules.stage_sizes(" 1.5;2 \n 4", (832, 1216), 8) == [
        (1248, 1824), (1664, 2432), (3328, 4864),
    ]  # fmt: skip
    assert rules.stage_sizes("1.5", (832, 1216), 64) == [(1280, 1856)]
    assert rules.stage_sizes("1536x1024, 3000x2001", (768, 1024), 8) == [(1024, 1536), (2000, 3000)]


@pytest.mark.parametrize(
    ("scales", "got"),
    [
        ("", "got none"), (" , ", "got none"), ("2, 1.5", "got '1.5'"), ("1.5, 1.5", "got '1.5'"),
        ("1.0", "got '1.0'"), ("4.1", "got '4.1'"), ("2, x", "got 'x'"), ("-2", "got '-2'"),
        ("nan", "got 'nan'"), ("1e1", "got '1e1'"), ("512x512", "got '512x512'"),
        ("9999x1024", "got '9999x1024'"), ("1.001", "in multiples of 8 px 1000x600"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_named(rules, scales, got):
    with pytest.raises(ValueError, match=r"above 1 and up to 4.*of 1000x600 px; got") as error:
        rules.stage_sizes(scales, (600, 1000), 8)
    assert got in str(error.value)
