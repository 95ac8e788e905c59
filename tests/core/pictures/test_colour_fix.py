"""The colours of a result made those of its source."""

import pytest
import torch
from torch.nn import functional as F

from infdit_core.pictures import colour_fix
from infdit_core.pictures.colour_fix import COLOUR_FIXES, fix_colours, from_lab, to_lab

FIXES = [method for method in COLOUR_FIXES if method != "none"]


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth shapes with some grain, (1, H, W, C) in 0.2..0.8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 7, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    grain = torch.rand(1, channels, height, width, generator=generator)
    return (0.2 + 0.5 * smooth + 0.1 * grain).movedim(1, -1)


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    x = F.interpolate(image.movedim(-1, 1), size=(height, width), mode="bicubic", antialias=True)
    return x.movedim(1, -1)


@pytest.mark.parametrize("method", FIXES)
def test_a_cast_is_removed(method):
    true = photo(160, 240)
    source = resized(true, 40, 60)
    cast = (true + torch.tensor([0.08, -0.05, 0.03])).clamp(0, 1)
    fixed = fix_colours(cast, source, method)
    assert (fixed.mean((1, 2)) - true.mean((1, 2))).abs().max() < 1 / 255
    # and the detail stays
    assert (fixed - true).abs().mean() < 0.2 * (cast - true).abs().mean()


@pytest.mark.parametrize(("method", "worst"), [("adain", 0.01), ("lab", 0.2)])
def test_faded_contrast_comes_back(method, worst):
    # a fade of sRGB is none of CIELAB exactly
    true = photo(160, 240)
    faded = 0.5 + 0.7 * (true - 0.5)
    fixed = fix_colours(faded, resized(true, 40, 60), method)
    assert (fixed - true).abs().mean() < worst * (faded - true).abs().mean()


def test_contrast_is_not_driven_to_extremes():
    flat = 0.5 + 0.001 * (photo(40, 40) - 0.5)
    fixed = fix_colours(flat, photo(10, 10, seed=1), "adain")
    torch.testing.assert_close(fixed.std((1, 2)), 2 * flat.std((1, 2)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", FIXES)
def test_a_picture_that_matches_stays(method):
    true = photo(160, 240)
    fixed = fix_colours(true, resized(true, 40, 60), method)
    assert (fixed - true).abs().max() < (1e-4 if method != "wavelet" else 2 / 255)


def test_none_is_the_picture_itself():
    image = photo(8, 8)
    assert fix_colours(image, photo(2, 2, seed=1), "none") is image


@pytest.mark.parametrize("method", FIXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (5, 3)])
def test_every_size_works(method, size):
    source = photo(*size)
    large = tuple(4 * side for side in size)
    true = resized(source, *large)
    fixed = fix_colours((true + torch.tensor([0.08, -0.05, 0.03])).clamp(0, 1), source, method)
    assert fixed.shape == (1, *large, 3)
    assert (fixed.mean((1, 2)) - true.mean((1, 2))).abs().max() < 0.08 / 2


@pytest.mark.parametrize("method", FIXES)
def test_alpha_and_the_inputs_stay_and_grey_sources_do(method):
    image, source = photo(20, 24, channels=4), photo(5, 6, channels=4, seed=1)
    copies = image.clone(), source.clone()
    fixed = fix_colours(image, source, method)
    assert torch.equal(fixed[..., 3], image[..., 3])
    assert not torch.equal(fixed[..., :3], image[..., :3])
    assert torch.equal(image, copies[0])
    assert torch.equal(source, copies[1])
    grey = fix_colours(image[..., :3], source[..., :1].half(), method)
    assert (grey.mean((1, 2)) - source[..., :1].mean()).abs().max() < 0.02


@pytest.mark.parametrize("method", FIXES)
def test_pictures_of_a_batch_do_not_mix_and_strips_do_not_show(method, monkeypatch):
    images = torch.cat([photo(150, 40, seed=s) for s in (0, 1)])
    sources = torch.cat([photo(38, 10, seed=s) for s in (2, 3)])
    whole = fix_colours(images, sources, method)
    monkeypatch.setattr(colour_fix, "_STRIP_PX", 1)
    torch.testing.assert_close(fix_colours(images, sources, method), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(fix_colours(images[1:], sources[1:], method), whole[1:])


def test_wavelet_keeps_what_is_fine_and_takes_what_is_coarse():
    fine = torch.tensor([0.4, 0.6]).repeat(128).expand(1, 3, 256, -1).movedim(1, -1)
    fixed = fix_colours(fine, torch.full((1, 64, 64, 3), 0.3), "wavelet")
    torch.testing.assert_close(fixed[:, 40:-40, 40:-40], fine[:, 40:-40, 40:-40] - 0.2)


def test_lab_is_that_of_the_cie():
    # L, a, b of sRGB red, green, blue, white and black, as tabulated for D65
    rgb = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]).T[..., None]
    expected = torch.tensor(
        [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
         [100, 0, 0], [0, 0, 0]]
    ).T[..., None]  # fmt: skip
    lab = to_lab(rgb) * 100 - torch.tensor([16.0, 0, 0])[:, None, None]
    torch.testing.assert_close(lab, expected, atol=0.02, rtol=0)
    colours = torch.rand(3, 30, 30)
    torch.testing.assert_close(from_lab(to_lab(colours)), colours, atol=1e-5, rtol=0)


def test_an_unknown_fix_is_named():
    with pytest.raises(ValueError, match="unknown colour fix 'sepia', expected one of none, wav"):
        fix_colours(photo(4, 4), photo(1, 1), "sepia")
