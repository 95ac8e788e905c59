"""What attention looks at before any training."""

import pytest
import torch

from infdit_core.blocks.schedules import Full
from infdit_core.network.attention import sdpa
from infdit_core.network.condition import Condition
from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT
from training.initial import initialise

CONFIGS = {
    "bundled": InfDiTConfig(128, 2, 4, 4, 8, 512, 0),
    "head of 64": InfDiTConfig(256, 2, 4, 4, 16, 512, 0),
    "as released, narrow": InfDiTConfig(320, 2, 4, 4, 32, 512, 0),
}


def recorded(config):
    """Attention of the LR window and of every layer: lists of (heads, queries, keys)."""
    torch.manual_seed(0)
    model = initialise(InfDiT(config))
    found = {"lr": [], "self": []}

    def attend(q, k, v):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        kind = "lr" if k.shape[-2] == config.lr_window**2 else "self"
        found[kind].append(scores.softmax(-1).flatten(0, -4).mean(0))
        return sdpa(q, k, v)

    model.attend = attend
    side = 2 * config.block_px
    picture = torch.randn(1, 3, side, side)
    with torch.no_grad():
        cond = Condition(picture, torch.randn(1, 3, side // 4, side // 4))
        model.denoise(picture, 1.0, cond, Full())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_look_at_the_lr_tokens_around_them(name):
    config = CONFIGS[name]
    (share, *_) = recorded(config)["lr"]
    width, side = config.lr_window, config.block_patches
    place = (torch.arange(side) + 0.5) * config.lr_block / side + config.lr_block - 0.5
    token = torch.arange(width, dtype=torch.float32)
    seen = {}
    for head, offset in enumerate([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]):
        query = share[head].unflatten(0, (side, side)).unflatten(-1, (width, width))
        y, x = ((token - place[:, None] - o).abs() < 1 for o in offset)
        near = y[:, None, :, None] & x[None, :, None, :]  # of 2×2 tokens around the place
        assert near.sum((-2, -1)).max() <= 4
        seen[offset] = (query * near).sum((-2, -1)).mean().item()
    assert min(seen.values()) > 0.5, seen


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_look_at_neighbours(name):
    config = CONFIGS[name]
    side = config.block_patches
    rows = recorded(config)["self"]
    sides = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    for layer, offsets in enumerate((sides, corners)):
        share = rows[layer * (len(rows) // 2)][..., : side**2].unflatten(-1, (side, side))
        near = []  # mean share by place beside the query, over the inner queries
        for query in range(2 * side + 2, (side - 2) * side - 2):
            y, x = divmod(query, side)
            if 2 <= x < side - 2:
                near.append(share[:, query, y - 2 : y + 3, x - 2 : x + 3])
        mean = torch.stack(near).mean(0).flatten(1)
        assert [divmod(int(i), 5) for i in mean.argmax(-1)] == [(y + 2, x + 2) for y, x in offsets]
