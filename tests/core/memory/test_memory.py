"""Peak memory is what the schedules promise (section by section: tokens, frontier, one chunk)."""

import pytest
import torch

from infdit_core.blocks.grid import Grid
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.network.run import Run
from tests.goldens import golden_model, random_condition

GRID = Grid(4, 16)
BLOCKS = GRID.rows * GRID.columns
CHUNK_WIDTHS = 32
"""Hidden vectors per token that one block at work may take: qkv, neighbours, gathered K/V, MLP."""


@pytest.fixture(scope="module")
def model():
    return golden_model("xs")


def peak_bytes(model, schedule) -> int:
    """Of one evaluation, without what exists once per picture whatever the schedule."""
    x, cond = random_condition(model, GRID.rows, GRID.columns)
    run = Run()
    run.lr_kv = model.lr_keys_values(cond.lr)
    c_in = torch.tensor([1.0])
    with LiveBytes() as live:
        model(x, c_in, cond, schedule, run=run)
    return live.peak - x.nbytes  # the result


def block_bytes(model) -> int:
    """Tokens of one block."""
    return model.config.block_tokens * model.config.hidden_size * 4


def test_live_bytes_counts_what_is_alive():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[500:]
        del a, b
        c = view * 2
        assert live.live == 4000 + 2000
        del view
        assert live.live == 2000
        del c
    assert live.live == 0
    assert live.peak == 8000


def test_full_holds_the_activations_of_the_whole_picture(model):
    peak = peak_bytes(model, Full())
    assert 8 <= peak / (BLOCKS * block_bytes(model)) <= 14


def test_block_major_holds_one_line_of_keys_and_values_per_layer(model):
    block = block_bytes(model)
    frontier = (
        model.config.num_layers * 2 * (GRID.line_blocks + 3) * block
    )  # and the end, the corner
    peak = peak_bytes(model, BlockMajor(1))
    assert peak <= frontier + CHUNK_WIDTHS * block
    assert peak <= peak_bytes(model, Full()) / 5


def test_layer_major_holds_the_tokens_and_one_line_of_keys_and_values(model):
    block = block_bytes(model)
    frontier = 2 * (GRID.line_blocks + 3) * block
    peak = peak_bytes(model, LayerMajor(1))
    assert peak <= BLOCKS * block + frontier + CHUNK_WIDTHS * block
    assert peak <= peak_bytes(model, Full()) / 5


def test_the_frontier_spans_the_shorter_side(model):
    """A wide and a tall picture of the same blocks need the same memory."""

    def of(rows, columns):
        x, cond = random_condition(model, rows, columns)
        with LiveBytes() as live:
            model(x, torch.tensor([1.0]), cond, BlockMajor(1))
        return live.peak

    assert of(2, 24) == pytest.approx(of(24, 2), rel=0.01)
    assert of(2, 24) < of(8, 24) / 2
