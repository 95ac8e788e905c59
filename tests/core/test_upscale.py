"""The whole way of a picture, and what is handed in to it."""

import pytest
import torch

from infdit_core import (
    InfDiTError,
    LayerMajor,
    Sampler,
    edm_sigmas,
    prepare,
    sample,
    upscale,
)
from infdit_core.memory import host
from infdit_core.network.model import InfDiT
from infdit_core.sampling import PRESETS
from tests.goldens import TINY

IMAGE = torch.rand(2, 13, 9, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> InfDiT:
    model = InfDiT(TINY).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    return model


def test_it_is_prepare_sample_and_finish_for_each_picture(model):
    result = upscale(IMAGE, 4.0, model=model, seed=3, schedule=LayerMajor(2))
    for picture, got in zip(IMAGE.split(1), result.split(1), strict=True):
        canvas = prepare(picture, block_px=TINY.block_px)
        noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(3))
        x = sample(model, canvas.condition(), edm_sigmas(20), noise=noise, schedule=LayerMajor(2))
        assert torch.equal(got, canvas.finish(x))


def test_what_is_handed_in_draws_every_pass(model):
    seen = []

    class Nearest:
        block_px, device = TINY.block_px, torch.device("cpu")
        consistency = 0

        def prepare(self, canvas):
            return canvas

        def __call__(self, canvas):
            seen.append((canvas.height, canvas.width))
            return canvas.concat

    result = upscale(IMAGE, (13 * 16, 9 * 16), Nearest())
    assert seen == 2 * [(52, 36), (208, 144)]
    assert result.shape == (2, 208, 144, 3)


def test_memory_that_runs_out_takes_a_smaller_plan(model, monkeypatch, caplog):
    expected, layer, calls = upscale(IMAGE, 4.0, model=model), InfDiT.layer, []

    def fails_once(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("injected")
        return layer(self, *args)

    monkeypatch.setattr(InfDiT, "layer", fails_once)
    result = upscale(IMAGE, 4.0, model=model)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert "out of memory with" in caplog.text


def test_a_budget_is_kept(model):
    draws = [Sampler(model, PRESETS["draft"], memory_bytes=b) for b in (None, 1e9, 1.0)]
    plans = [draw.plan(prepare(IMAGE[:1], 30.0, block_px=TINY.block_px)).plan for draw in draws]
    assert plans[2].peak_bytes < plans[0].peak_bytes == plans[1].peak_bytes


def test_what_cannot_fit_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(host, "available_bytes", lambda: 1e6)
    monkeypatch.setattr(InfDiT, "forward", None)
    with pytest.raises(InfDiTError, match="2 pictures of 360×520 px need at least"):
        upscale(IMAGE, 40.0, model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs a model or draw"), ({"draw": lambda c: c, "seed": 1}, "not with draw: seed")],
)
def test_calls_that_make_no_sense(options, message):
    with pytest.raises(TypeError, match=message):
        upscale(IMAGE, 4.0, **options)
