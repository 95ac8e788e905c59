"""Colours of invisible pixels: filled from visible ones, and without any part in a result."""

import pytest
import torch
from torch.nn import functional as F

from infdit_core import load_model, upscale
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.network.model import InfDiT
from infdit_core.pictures import alpha
from infdit_core.pictures.alpha import fill_invisible
from infdit_core.pictures.colour_fix import COLOUR_FIXES, fix_colours
from infdit_core.pictures.wrap import WRAPS
from tests.goldens import TINY

BLACK, MAGENTA = torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])


def disc(colours: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A soft disc (1, H, W, 4) of colours (H, W, 3), other colours under what is invisible."""
    height, width = colours.shape[:2]
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    opacity = (min(height, width) / 3 + 0.5 - (y**2 + x**2).sqrt()).clamp(0, 1)[..., None]
    return torch.cat([torch.where(opacity > 0, colours, hidden), opacity], -1)[None]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_invisible_colours_change_and_never_the_picture_given(wrap, dtype):
    picture = disc(torch.rand(37, 54, 3), MAGENTA)[0]
    gone, whole = (torch.rand(37, 54, 4) for _ in range(2))
    gone[..., 3], whole[..., 3] = 0, 0.5
    pictures = torch.stack([gone, picture, whole]).to(dtype)
    copy = pictures.clone()
    filled = fill_invisible(pictures, wrap)
    assert torch.equal(pictures, copy)
    assert torch.equal(filled[::2], pictures[::2])  # nothing to be seen, or all of it
    seen = pictures[..., 3:] > 0
    assert torch.equal(filled * seen, pictures * seen)
    assert torch.equal(filled[..., 3], pictures[..., 3])
    assert not (filled[1] == MAGENTA.new_tensor([1, 0, 1, 0])).all(-1).any()
    assert torch.equal(fill_invisible(filled, wrap), filled)
    for same in (pictures[::2], pictures[..., :3], pictures[..., :1]):
        assert fill_invisible(same, wrap) is same


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (2, 3), (37, 54), (64, 65)])
def test_one_colour_goes_on_to_the_edge_in_sixteen_bits(size):
    colour = torch.tensor([1.0, 12345 / 65535, 1 / 65535])
    picture = torch.cat([torch.rand(1, *size, 3), torch.zeros(1, *size, 1)], -1)
    picture[0, size[0] // 2, size[1] // 2] = torch.cat([colour, torch.tensor([1 / 65535])])
    filled = fill_invisible(picture)
    assert (filled[..., :3] - colour).abs().max() < 0.01 / 65535


def test_an_alpha_that_no_file_can_show_is_none():
    picture = disc(torch.rand(20, 20, 3), MAGENTA)
    faint = picture.clone()
    faint[..., 3].clamp_(min=6e-8)  # one minus a mask that was resized
    assert torch.equal(fill_invisible(faint)[..., :3], fill_invisible(picture)[..., :3])


def test_a_hole_in_a_gradient_is_closed_and_its_outside_stays_near():
    ramp = torch.linspace(0, 1, 64).expand(64, 64)
    gradient = torch.stack([ramp, ramp.T, (ramp + ramp.T) / 2], -1)
    hole = torch.zeros(64, 64, 1, dtype=torch.bool)
    hole[24:33, 20:29] = True
    picture = torch.cat([torch.where(hole, MAGENTA, gradient), (~hole).float()], -1)[None]
    assert (fill_invisible(picture)[0, ..., :3] - gradient).abs().max() < 3 / 64
    picture[..., :40, 3] = 1
    picture[..., 40:, 3] = 0  # and beyond an edge, within three pixels, three pixels' difference
    filled = fill_invisible(picture)[0, ..., :3]
    assert (filled[:, 40:43] - gradient[:, 40:43]).abs().max() < 4 / 64
    assert filled[:, 40:, 0].max() <= gradient[0, 39, 0]
    assert filled[:, 40:, 0].min() > 0.4


def test_a_picture_that_goes_on_around_is_filled_from_its_other_side():
    picture = torch.zeros(1, 30, 32, 4)
    picture[:, :, :4] = torch.tensor([1.0, 0, 0, 1])
    picture[:, :, 12:16] = torch.tensor([0, 0, 1.0, 1])
    for turned, wrap in ((picture, "horizontal"), (picture.transpose(1, 2), "both")):
        red = {w: fill_invisible(turned, w)[0, -1, -1, 0].item() for w in ("none", wrap)}
        assert red["none"] < 0.2 < 0.5 < red[wrap]


def test_strips_do_not_show(monkeypatch):
    picture = disc(torch.rand(37, 54, 3), BLACK)
    whole = fill_invisible(picture, "both")
    monkeypatch.setattr(alpha, "_STRIP_PX", 1)
    assert torch.equal(fill_invisible(picture, "both"), whole)


@pytest.fixture(scope="module")
def tiny() -> InfDiT:
    model = InfDiT(TINY).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 6.0},
        {"wrap": "both"},
        {"consistency": 2},
        {"mask": torch.ones(6, 8).tril(), "size": 6.0},
        {"start": (9, 12)},
        {"start": (36, 48), "wrap": "horizontal"},
        *({"colour_fix": method} for method in COLOUR_FIXES[1:]),
    ],
)
def test_no_way_through_sees_what_is_invisible(tiny, settings):
    colours = torch.rand(9, 12, 3)
    start = torch.rand(*settings.pop("start", (0, 0)), 3)
    results = []
    for hidden in (BLACK, MAGENTA):
        more = {"start": disc(start, hidden)} if start.numel() else {}
        result = upscale(
            disc(colours, hidden), model=tiny, preset="draft", denoise=0.5, **more, **settings
        )
        results.append(result)
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", [{}, {"size": 8.0}, {"consistency": 3, "colour_fix": "lab"}])
def test_a_white_disc_on_black_stays_white(settings):
    model = load_model(BUNDLED_FOLDER / "infdit_small.safetensors").requires_grad_(False)
    result = upscale(disc(torch.ones(32, 32, 3), BLACK), model=model, **settings)
    assert result[..., 3].min() == 0
    assert result[..., 3].max() == 1
    visible = result[..., :3][result[..., 3] > 0]
    assert (visible * 255).round().min() >= 254  # as in 8 bits, and as an opaque one comes out


@pytest.mark.parametrize("method", COLOUR_FIXES[1:])
@pytest.mark.parametrize("hidden", [BLACK, MAGENTA])
def test_the_visible_half_has_its_colours_fixed_as_if_alone(method, hidden):
    shapes = 0.2 + 0.6 * torch.rand(1, 3, 5, 7)
    half = F.interpolate(shapes, size=(40, 60), mode="bicubic").clamp(0.1, 0.9).movedim(1, -1)
    large = F.interpolate(half.movedim(-1, 1), scale_factor=4, mode="bicubic").movedim(1, -1)
    cast = 0.8 * large + torch.tensor([0.12, 0.02, 0.08])

    def beside_nothing(x: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        unseen = torch.cat([hidden, torch.zeros(1)]).expand_as(seen)
        return torch.cat([seen, unseen], 2)

    alone = fix_colours(cast, half, method)
    fixed = fix_colours(beside_nothing(cast), beside_nothing(half), method)
    assert (alone - cast).abs().mean() > 8 / 255
    away = (fixed[:, :, :240, :3] - alone).abs()
    assert away[:, :, :200].max() < 0.5 / 255
    assert away.max() < (4 if method == "wavelet" else 0.5) / 255  # whose blur ends at the edge
