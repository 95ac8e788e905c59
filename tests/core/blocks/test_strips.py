"""A picture in strips, each on a device of its own, equals the whole picture to the bit."""

from dataclasses import replace

import pytest
import torch

from infdit_core import BlockMajor, Full, InfDiTError, LayerMajor
from infdit_core.blocks.grid import Chunk, Grid, Strip
from infdit_core.blocks.strips import in_strips
from infdit_core.network.run import Run
from tests.goldens import golden_model, random_condition

CPU = torch.device("cpu")
SCHEDULES = [Full(), LayerMajor(1), LayerMajor(3), LayerMajor(100), BlockMajor(2)]
SCHEDULES += [replace(LayerMajor(2), keep_lr=False, tokens_on_host=True)]


@pytest.fixture(scope="module")
def model():
    return golden_model("xs")


def in_parts(model, x, sigma, cond, count, schedules, runs=None):
    """D made of strips, the n-th with schedule n."""
    side, grid = model.config.block_px, model.grid(x)
    result = torch.empty_like(x)

    def compute(strip: Strip, _) -> None:
        n = grid.strips([1] * count).index(strip.chunk)
        rows, columns = strip.chunk.scaled(side)
        own = replace(cond, concat=cond.concat[..., rows, columns])
        run = runs[n] if runs else None
        result[..., rows, columns] = model.denoise(
            x[..., rows, columns], sigma, own, schedules[n % len(schedules)], run=run, strip=strip
        )

    in_strips(grid, [CPU] * count, compute)
    return result


@pytest.mark.parametrize("grid", [(4, 3), (7, 2), (2, 5), (1, 4)], ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_strips_equal_the_whole_picture_to_the_bit(model, grid, count):
    x, cond = random_condition(model, *grid, batch=2)
    sigma = torch.tensor([0.3, 5.0])
    expected = model.denoise(x, sigma, cond, Full())
    for schedule in SCHEDULES:
        found = in_parts(model, x, sigma, cond, count, [schedule])
        assert torch.equal(found, expected), schedule


def test_strips_of_different_orders_and_a_run_of_several_evaluations(model):
    x, cond = random_condition(model, 7, 2)
    runs = [Run() for _ in range(3)]
    for sigma in (5.0, 0.3):
        expected = model.denoise(x, sigma, cond, Full())
        found = in_parts(model, x, sigma, cond, 3, [LayerMajor(1), Full(), BlockMajor(1)], runs)
        assert torch.equal(found, expected)
    assert all(run.lr_kv is not None for run in runs)


def test_uneven_lines():
    assert Grid(7, 2).strips([1] * 3) == [Chunk(0, 2, 0, 2), Chunk(2, 5, 0, 2), Chunk(5, 7, 0, 2)]
    assert Grid(2, 5).strips([1, 1]) == [Chunk(0, 2, 0, 2), Chunk(0, 2, 2, 5)]
    assert Grid(8, 2).strips([3, 1]) == [Chunk(0, 6, 0, 2), Chunk(6, 8, 0, 2)]
    assert Grid(3, 1).strips([100, 1, 1]) == [Chunk(n, n + 1, 0, 1) for n in range(3)]
    with pytest.raises(InfDiTError, match="at most as many strips as the picture's 5 lines"):
        Grid(2, 5).strips([1] * 6)


def test_more_devices_than_lines_of_blocks(model):
    x, _ = random_condition(model, 2, 1)
    assert in_strips(model.grid(x), [CPU] * 5, lambda strip, _: strip.chunk.rows) == [1, 1]


def test_a_strip_that_fails_ends_the_others_with_its_reason(model):
    x, cond = random_condition(model, 4, 2)

    def fail(done, total):
        raise InterruptedError("cancelled")

    runs = [Run(), Run(fail), Run(), Run()]
    with pytest.raises(InterruptedError, match="cancelled"):
        in_parts(model, x, 1.0, cond, 4, [LayerMajor(1)], runs)


def test_bytes_sent(model):
    x, cond = random_condition(model, 4, 3)
    links = []

    def compute(strip, _):
        links.append(strip.link)
        rows, columns = strip.chunk.scaled(model.config.block_px)
        own = replace(cond, concat=cond.concat[..., rows, columns])
        model.denoise(x[..., rows, columns], 1.0, own, Full(), strip=strip)

    in_strips(model.grid(x), [CPU] * 2, compute)
    config = model.config
    line = 2 * 3 * config.block_tokens * config.hidden_size * 4  # keys and values of three blocks
    assert sorted(link.sent_bytes for link in links) == [0, config.num_layers * line]
