"""Layers left out where sigma has hardly changed."""

import pytest
import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.edm import edm_sigmas
from infdit_core.network.residual_cache import ResidualCache
from infdit_core.network.run import Run
from infdit_core.sampling import sample
from tests.goldens import golden_model, random_condition


@pytest.fixture(scope="module")
def model():
    return golden_model("xs")


@pytest.mark.parametrize("schedule", [Full(), BlockMajor(2), LayerMajor(2)], ids=str)
def test_the_same_picture_again_costs_fewer_layers_and_is_the_same(model, schedule):
    x, cond = random_condition(model, 3, 4, batch=2)
    cache, cells = ResidualCache(1), []
    expected = model.denoise(x, 0.7, cond, schedule)

    def denoise():
        cells.clear()
        run = Run(lambda *cell: cells.append(cell), cache)
        return model.denoise(x, 0.7, cond, schedule, run=run)

    first = denoise()
    layers = model.config.num_layers
    whole = len(cells)
    second = denoise()
    assert torch.equal(first, expected)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=0)
    assert cells[-1] == (len(cells), len(cells))
    assert len(cells) == whole * (layers - 1) // layers
    assert cache.reused == 1


def test_another_schedule_or_device_of_the_cache_reuses_it_as_well(model):
    x, cond = random_condition(model, 3, 4)
    for on_host in (False, True):
        cache = ResidualCache(1)
        schedule = LayerMajor(3, tokens_on_host=on_host)
        expected = model.denoise(x, 0.7, cond, schedule, run=Run(cache=cache))
        assert cache._on_host == on_host
        result = model.denoise(x, 0.7, cond, BlockMajor(1), run=Run(cache=cache))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        assert cache.reused == 1


def test_heun_reuses_every_evaluation_at_a_level_that_was_evaluated_before(model):
    noise, cond = random_condition(model, 2, 2)
    cache = ResidualCache(1)
    expected = sample(model, cond, edm_sigmas(6), noise=noise)
    result = sample(model, cond, edm_sigmas(6), noise=noise, run=Run(cache=cache))
    assert cache.reused == 5
    assert 0 < (result - expected).abs().max() < 0.5


def test_one_evaluation_a_step_reuses_within_the_tolerance(model):
    noise, cond = random_condition(model, 1, 2)
    for tolerance, reused in ((0.0, 0), (10.0, 7)):
        cache = ResidualCache(1, tolerance)
        sample(model, cond, edm_sigmas(8), noise=noise, solver="euler", run=Run(cache=cache))
        assert cache.reused == reused


def test_an_evaluation_that_was_broken_off_is_not_reused(model):
    x, cond = random_condition(model, 2, 2)
    cache = ResidualCache(1)

    def cancel(done, total):
        if done == total - 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.denoise(x, 1.0, cond, LayerMajor(1), run=Run(cancel, cache))
    expected = model.denoise(x, 1.0, cond)
    assert torch.equal(model.denoise(x, 1.0, cond, run=Run(cache=cache)), expected)
    assert cache.reused == 0


def test_what_cannot_be_left_out_is_refused(model):
    x, cond = random_condition(model, 1, 1)
    layers = model.config.num_layers
    with pytest.raises(ValueError, match=f"fewer layers to leave out than the model's {layers}"):
        model.denoise(x, 1.0, cond, run=Run(cache=ResidualCache(layers)))
    with pytest.raises(ValueError, match="at least 1 layer"):
        ResidualCache(0)
