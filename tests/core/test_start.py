"""Another upscaler's picture to start from."""

import pytest
import torch

from infdit_core import InfDiTError, Sampler, prepare, sample, upscale
from infdit_core.network.model import InfDiT
from infdit_core.sampling import PRESETS
from tests.goldens import TINY

IMAGE = torch.rand(2, 13, 9, 3, generator=torch.Generator().manual_seed(0))
START = torch.rand(2, 52, 36, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> InfDiT:
    model = InfDiT(TINY).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    return model


def test_only_the_start_is_another_picture(model):
    settings = {"model": model, "preset": PRESETS["draft"], "denoise": 0.5, "seed": 3}
    result = upscale(IMAGE, 4.0, start=START, **settings)
    for picture, start, got in zip(IMAGE.split(1), START.split(1), result.split(1), strict=True):
        canvas = prepare(picture, block_px=TINY.block_px)
        noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(3))
        placed = prepare(start, 1.0, block_px=TINY.block_px).concat
        x = sample(
            model,
            canvas.condition(),
            PRESETS["draft"].sigmas(0.5),
            noise=noise,
            solver="multistep",
            start=placed,
        )
        assert torch.equal(got, canvas.finish(x))


def test_without_denoising_the_start_comes_out_at_the_size_of_the_result(model):
    kept = upscale(IMAGE, 4.0, model=model, denoise=0.0, start=START[:1])
    torch.testing.assert_close(kept, START[:1].expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    smaller = upscale(IMAGE, 4.0, model=model, denoise=0.0, start=IMAGE)
    assert torch.equal(smaller, upscale(IMAGE, 4.0, model=model, denoise=0.0))


def test_of_several_passes_the_last_starts_from_it():
    seen = []

    class Enlarges:
        block_px, device = TINY.block_px, torch.device("cpu")
        consistency = 0

        def prepare(self, canvas):
            return canvas

        def __call__(self, canvas):
            seen.append(canvas.start)
            return canvas.first

    result = upscale(IMAGE[:1], 8.0, Enlarges(), start=START[:1])
    assert seen[0] is None
    assert torch.equal(result, upscale(START[:1], 2.0, Enlarges()))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.rand(1, 40, 40, 3), "in the shape of the result, 36×52 px, .* got 40×40 px"),
        (torch.rand(1, 260, 180, 3), "at most 4 times as large; got 180×260 px"),
        (torch.rand(3, 52, 36, 3), "expected 1 or 2 pictures to start from; got 3"),
        (torch.full((1, 52, 36, 3), float("nan")), "the picture to start from: expected finite"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_any_work(model, monkeypatch, start, message):
    monkeypatch.setattr(InfDiT, "forward", None)
    with pytest.raises(InfDiTError, match=message):
        upscale(IMAGE, 4.0, Sampler(model), start=start)
