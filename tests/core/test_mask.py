"""Masks: what is upscaled, and what keeps what sampling starts from."""

import importlib
from dataclasses import replace

import pytest
import torch

from infdit_core import InfDiTError, Sampler, load_model, upscale
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.network.model import InfDiT
from infdit_core.sampling import PRESETS

IMAGE = torch.rand(1, 20, 28, 3, generator=torch.Generator().manual_seed(0))  # 80x112: 3x4 blocks
START = torch.rand(1, 80, 112, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def draw() -> Sampler:
    path = BUNDLED_FOLDER / "infdit_small.safetensors"
    return Sampler(load_model(path).requires_grad_(False), PRESETS["draft"], seed=2)


@pytest.fixture(scope="module")
def auto(draw) -> Sampler:
    """The preset of the model's file, which corrects its result."""
    return Sampler(draw.model, seed=2)


@pytest.fixture
def blocks(monkeypatch) -> list[tuple[int, int]]:
    """Rows and columns of blocks in every evaluation."""
    seen, forward = [], InfDiT.forward

    def counted(self, x, *args, **kwargs):
        if x.device.type != "meta":  # where the planner measures
            seen.append((x.shape[-2] // 32, x.shape[-1] // 32))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(InfDiT, "forward", counted)
    return seen


def white(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    mask = torch.zeros(1, 80, 112)
    mask[:, top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(("by", "atol"), [(4.0, 0), (4.5, 2e-6)])  # resizing rounds a mask of 1
def test_all_white_is_no_mask(auto, blocks, by, atol):
    for start in (None, START):
        plain = upscale(IMAGE, by, auto, start=start)
        for mask in (torch.ones(1, 80, 112), torch.ones(64, 64)):
            found = upscale(IMAGE, by, auto, start=start, mask=mask)
            torch.testing.assert_close(found, plain, atol=atol, rtol=0)
    assert (3, 4) in blocks


@pytest.mark.parametrize("start", [None, START])
def test_black_keeps_the_start_and_takes_no_time(draw, blocks, monkeypatch, start):
    still = Sampler(draw.model, PRESETS["draft"], denoise=0.0)
    kept = upscale(IMAGE, 4.0, still, start=start)
    mask = white(8, 30, 40, 60)
    found = upscale(IMAGE, 4.0, draw, start=start, mask=mask)
    assert set(blocks) == {(2, 3)}  # the block of row 0 and column 1, and one more of each
    inside = mask[..., None].expand_as(found) > 0
    torch.testing.assert_close(found[~inside], kept[~inside], atol=2e-6, rtol=0)
    assert (found - kept)[inside].abs().mean() > 0.02
    monkeypatch.setattr(  # nothing is cut off
        importlib.import_module("infdit_core.upscale"),
        "masked",
        lambda canvas, mask, block_px: replace(canvas, mask=mask),
    )
    whole = upscale(IMAGE, 4.0, draw, start=start, mask=mask)
    assert blocks[-1] == (3, 4)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)


def test_all_black_is_not_drawn(draw, blocks, caplog):
    found = upscale(IMAGE, 4.0, draw, start=START, mask=torch.zeros(64, 64))
    torch.testing.assert_close(found, START, atol=1e-6, rtol=0)
    assert not blocks
    assert "the mask is black everywhere" in caplog.text


def test_more_grey_is_more_of_it(auto):
    masks = [torch.full((1, 20, 28), grey) for grey in (0.0, 0.25, 0.5, 1.0)]
    found = [upscale(IMAGE, 4.0, auto, mask=mask) for mask in masks]
    away = [(picture - found[0]).abs().mean() for picture in found]
    assert away == sorted(away)
    assert away[1] > 0.001


def test_each_picture_has_its_mask_in_every_pass_and_colours_stay(draw):
    pair, both = torch.cat([IMAGE, IMAGE]), torch.cat([white(0, 80, 0, 56), white(0, 80, 56, 112)])
    found = upscale(pair, 4.5, draw, mask=both, colour_fix="adain", wrap="horizontal")
    kept = upscale(IMAGE, 4.5, draw, mask=torch.zeros(1, 1), wrap="horizontal")[0]
    torch.testing.assert_close(found[0, :, 70:116], kept[:, 70:116], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1, :, 10:56], kept[:, 10:56], atol=2e-6, rtol=0)
    assert (found[0, :, :60] - kept[:, :60]).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.eye(40)[None], "a mask in the shape of the result, 112×80 px, .* got 40×40 px"),
        (torch.rand(2, 80, 112), "expected 1 mask; got 2"),
        (torch.rand(1, 1, 80, 112), "expected a mask of shape"),
        (torch.full((80, 112), float("nan")), "NaN"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(draw, blocks, mask, message):
    with pytest.raises(InfDiTError, match=message):
        upscale(IMAGE, 4.0, draw, mask=mask)
    assert not blocks
