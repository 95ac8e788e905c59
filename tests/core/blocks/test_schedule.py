"""Every order of computation gives the same result, in the memory that it promises."""

import math
from dataclasses import replace

import pytest
import torch

from infdit_core.blocks.grid import Grid
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.edm import edm_sigmas
from infdit_core.network.run import Run
from infdit_core.sampling import sample
from tests.goldens import golden_model, random_condition

GRIDS = [(1, 1), (2, 3), (3, 5), (4, 4), (1, 7), (7, 1)]
SIZES = [1, 2, 3, 4, 100]


@pytest.fixture(scope="module")
def model():
    return golden_model("xs")


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_all_schedules_agree(model, grid):
    x, cond = random_condition(model, *grid, batch=2)
    sigma = torch.tensor([0.3, 5.0])
    expected = model.denoise(x, sigma, cond, Full())
    for n in SIZES:
        layers, blocks = LayerMajor(n), BlockMajor(n)
        others = replace(layers, tokens_on_host=True), replace(blocks, frontier_on_host=True)
        for schedule in (blocks, layers, *others, replace(layers, keep_lr=False)):
            result = model.denoise(x, sigma, cond, schedule)
            torch.testing.assert_close(
                result, expected, atol=1e-5, rtol=0, msg=lambda m, s=schedule: f"{s}: {m}"
            )


@pytest.mark.parametrize("grid", [*GRIDS, (3, 11), (16, 4)])
@pytest.mark.parametrize(("depth", "length"), [(1, 1), (1, 2), (2, 2), (3, 2), (2, 100)])
def test_chunks_cover_every_block_once_and_after_its_neighbours(grid, depth, length):
    grid = Grid(*grid)
    done = set()
    for chunk in grid.chunks(depth, length):
        rows, columns = range(chunk.top, chunk.bottom), range(chunk.left, chunk.right)
        cells = {(i, j) for i in rows for j in columns}
        assert cells
        assert not cells & done
        for i, j in cells:
            for neighbour in ((i - 1, j - 1), (i, j - 1), (i - 1, j)):
                assert min(neighbour) < 0 or neighbour in done | cells
        done |= cells
    assert len(done) == grid.blocks


@pytest.mark.parametrize("schedule", [Full(), BlockMajor(2), LayerMajor(3), LayerMajor(1)])
def test_progress_counts_every_cell(model, schedule):
    x, cond = random_condition(model, 3, 5)
    calls = []
    model.denoise(x, 1.0, cond, schedule, run=Run(lambda *call: calls.append(call)))
    total = len(schedule.cells(Grid(3, 5), model.config.num_layers))
    assert calls == [(i + 1, total) for i in range(total)]


def test_an_exception_in_progress_stops_the_evaluation(model):
    x, cond = random_condition(model, 2, 2)
    calls = []

    def cancel(done, total):
        calls.append(done)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.denoise(x, 1.0, cond, LayerMajor(1), run=Run(cancel))
    assert calls == [1]


@pytest.mark.parametrize("kind", [BlockMajor, LayerMajor])
def test_a_chunk_of_nothing_is_refused(kind):
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        kind(0)


@pytest.mark.parametrize("schedule", [Full(), BlockMajor(1), LayerMajor(1)])
def test_lr_keys_are_made_once_per_token_and_picture(model, schedule):
    """Not nine times for the nine windows that a token lies in, nor in every evaluation."""
    noise, cond = random_condition(model, 3, 4)
    rows, columns = (n // 2 for n in cond.lr.shape[-2:])
    made = []
    hook = model.cross_attention.key_value.register_forward_hook(
        lambda m, args, out: made.append(math.prod(out.shape[:-1]))
    )
    sample(model, cond, edm_sigmas(3), noise=noise, schedule=schedule)
    hook.remove()
    assert sum(made) == rows * columns + 1  # and one for all that lie outside


def test_where_things_live_does_not_change_the_picture(model):
    noise, cond = random_condition(model, 2, 3)
    expected = sample(model, cond, edm_sigmas(3), noise=noise)
    schedule = LayerMajor(2, tokens_on_host=True, keep_lr=False, pictures_device="cpu")
    result = sample(model, cond, edm_sigmas(3), noise=noise, schedule=schedule)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
