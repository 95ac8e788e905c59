"""Predicted memory against the bytes that a run on the CPU is seen to take."""

import pytest
import torch

from infdit_core.dimr.config import G_2R, XL_2R
from infdit_core.dimr.load import load_model
from infdit_core.dimr.memory import sampling_bytes, weight_bytes
from infdit_core.dimr.sampling import sample
from infdit_core.memory.live_bytes import LiveBytes
from tests.goldens import golden_path


@pytest.mark.parametrize(
    ("name", "heads", "dtype"),
    [("tiny_2r.safetensors", 4, torch.float32), ("tiny_3r.safetensors", 2, torch.bfloat16)],
)
def test_sampling_takes_what_is_predicted(name, heads, dtype):
    model = load_model(golden_path(f"dimr/{name}"), dtype=dtype, heads=heads)
    side, batch = model.config.latent_side, 3
    with LiveBytes() as live:
        noise = torch.randn(batch, model.config.channels, side, side)
        classes = torch.zeros(batch, dtype=torch.int64)
        sample(model, noise, classes, evaluations=7, dtype=dtype)
    predicted = sampling_bytes(model.config, batch, dtype)
    assert abs(predicted / live.peak - 1) < 0.01
    weights = sum(p.nbytes for p in model.parameters())
    assert weight_bytes(model.config, dtype) == weights


def test_the_released_models():
    assert weight_bytes(XL_2R, torch.float32) == 4 * 505_046_408
    assert weight_bytes(G_2R, torch.bfloat16) == 2 * 1_056_352_904
    features = 40 * 960 * 256 * 4  # of the first stage
    assert 2 * features < sampling_bytes(XL_2R, 1, torch.bfloat16) < 4 * features
