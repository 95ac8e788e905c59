"""Pictures that go on around at their edges."""

import pytest
import torch

from infdit_core import InfDiTError, Sampler, load_model, prepare, upscale
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.network.model import InfDiT
from infdit_core.pictures.wrap import prepare_wrapped
from infdit_core.sampling import PRESETS
from tests.goldens import TINY


@pytest.fixture(scope="module")
def model() -> InfDiT:
    return load_model(BUNDLED_FOLDER / "infdit_small.safetensors").requires_grad_(False)


@pytest.mark.parametrize("size", [(52, 36), (31, 40), (50, 62), (10, 8)])
def test_it_is_the_middle_of_many_pictures_side_by_side(size):
    picture, (height, width) = torch.rand(1, 13, 9, 4), size
    canvas = prepare_wrapped(picture, size, 16, "horizontal")
    many = prepare(picture.repeat(1, 1, 13, 1), size=(height, 13 * width), block_px=16)
    rows, columns = canvas.concat.shape[-2:]
    assert columns % 16 == 0
    left = 6 * width - canvas.left
    middle = many.concat[..., :rows, left : left + columns]
    torch.testing.assert_close(canvas.concat, middle, atol=3e-5, rtol=0)
    if left % 4 == 0:
        middle = many.lr[..., : rows // 4, left // 4 : (left + columns) // 4]
        torch.testing.assert_close(canvas.lr, middle, atol=3e-5, rtol=0)
    assert many.alpha is not None
    middle = many.alpha[:, :, 6 * width : 7 * width]
    torch.testing.assert_close(canvas.alpha, middle, atol=3e-5, rtol=0)
    both = prepare_wrapped(picture.transpose(1, 2), (width, height), 16, "both")
    turned = both.crop(both.concat).transpose(2, 3)[..., 8:-8, :]  # rows end at the edges
    torch.testing.assert_close(turned, canvas.crop(canvas.concat)[..., 8:-8, :], atol=3e-5, rtol=0)


def test_what_is_drawn_goes_on_around_in_every_step(model):
    picture, steps = torch.rand(1, 10, 12, 3), []
    draw = Sampler(
        model, PRESETS["draft"], callback=lambda step: steps.append(step.denoised.clone())
    )
    canvas = draw.prepare(prepare_wrapped(picture, (40, 48), model.config.block_px, "both"))
    x = draw(canvas)
    assert canvas.wrap is not None
    assert len(steps) == PRESETS["draft"].steps
    for around in [x, *steps]:
        assert torch.equal(around, canvas.wrap(around))
        assert torch.equal(around[..., : canvas.top, :], around[..., 40 : 40 + canvas.top, :])
    assert torch.equal(canvas.finish(x), upscale(picture, 4.0, draw, wrap="both"))


def jump(picture: torch.Tensor, column: int) -> float:
    """How far a column is from going on as the three before it do; energy over all rows."""
    a, b, c, d = (picture.roll(2 - column, 2)[:, :, i] for i in range(4))
    return (d - 3 * c + 3 * b - a).square().mean().item()


def test_the_seam_is_as_the_rest_of_the_picture(model):
    angle = torch.arange(48) * torch.pi / 24
    waves = torch.stack([(k * angle[:, None] + angle).sin() for k in (1, 5, 9)], -1)
    texture = torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(0))
    picture = (0.5 + 0.3 * waves + 0.2 * (texture - 0.5))[None]
    draw = Sampler(model, PRESETS["draft"])
    found = {}
    for wrap in ("none", "horizontal"):
        result = upscale(picture, 4.0, draw, wrap=wrap)
        borders = [jump(result, column) for column in range(32, 192, 32)]
        found[wrap] = jump(result, 0) / (sum(borders) / len(borders))
    assert found["none"] > 2
    assert found["horizontal"] < 1.5


def test_alpha_start_and_passes_go_on_around(model):
    class Enlarges:
        block_px, device = TINY.block_px, torch.device("cpu")
        consistency = 0

        def prepare(self, canvas):
            return canvas

        def __call__(self, canvas):
            return canvas.first

    picture = torch.rand(1, 8, 8, 4)
    for start in (None, torch.rand(1, 40, 40, 3)):
        rolled = None if start is None else start.roll(20, 2)
        result = upscale(picture, 5.0, Enlarges(), wrap="horizontal", start=start)
        turned = upscale(picture.roll(4, 2), 5.0, Enlarges(), wrap="horizontal", start=rolled)
        torch.testing.assert_close(turned, result.roll(20, 2), atol=3e-5, rtol=0)


def test_what_cannot_work_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(InfDiT, "forward", None)
    with pytest.raises(InfDiTError, match="one of none, horizontal, both; got 'vertical'"):
        upscale(torch.rand(1, 8, 8, 3), 4.0, model=model, wrap="vertical")
    with pytest.raises(InfDiTError, match="expected colour_fix none, adain or lab with wrap both"):
        upscale(torch.rand(1, 8, 8, 3), 4.0, model=model, wrap="both", colour_fix="wavelet")
