"""Layers that come one at a time give the same picture, each once per evaluation."""

import torch

from infdit_core.edm import edm_sigmas
from infdit_core.sampling import sample
from infdit_core.schedule import LayerMajor
from tests.goldens import golden_model, random_condition


def test_streamed_layers_give_the_same_picture_each_copied_once_per_evaluation():
    resident, streamed = golden_model("xs"), golden_model("xs")
    noise, cond = random_condition(resident, 3, 4)
    expected = sample(resident, cond, edm_sigmas(3), noise=noise, schedule=LayerMajor(2))
    streamed.stream_layers("cpu")
    result = sample(streamed, cond, edm_sigmas(3), noise=noise, schedule=LayerMajor(2))
    assert torch.equal(result, expected)
    evaluations = 5
    assert streamed._stream is not None
    assert streamed._stream.copied == evaluations * streamed.config.num_layers


def test_streaming_leaves_the_layers_where_they_are_and_holds_one_copy():
    model = golden_model("xs")
    before = {k: v.clone() for k, v in model.layers.state_dict().items()}
    model.stream_layers("cpu")
    x, cond = random_condition(model, 1, 2)
    model.denoise(x, 1.0, cond, LayerMajor(1))
    for key, value in model.layers.state_dict().items():
        assert torch.equal(value, before[key])
    assert set(model.state_dict()) == set(golden_model("xs").state_dict())
