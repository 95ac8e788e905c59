"""Layers that come one at a time give the same picture, each once per evaluation."""

import pytest
import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.edm import edm_sigmas
from infdit_core.memory.adaptive import Adaptive
from infdit_core.memory.planner import Plan, weight_bytes
from infdit_core.sampling import sample
from tests.goldens import fail_at, golden_model, random_condition


def test_streamed_layers_give_the_same_picture_each_copied_once_per_evaluation():
    resident, streamed = golden_model("xs"), golden_model("xs")
    noise, cond = random_condition(resident, 3, 4)
    expected = sample(resident, cond, edm_sigmas(3), noise=noise, schedule=LayerMajor(2))
    streamed.stream_layers("cpu")
    result = sample(streamed, cond, edm_sigmas(3), noise=noise, schedule=LayerMajor(2))
    assert torch.equal(result, expected)
    evaluations = 5
    assert streamed._stream is not None
    # and the first for an evaluation that does not come
    assert streamed._stream.copied == evaluations * streamed.config.num_layers + 1


def test_layers_come_in_any_order_and_by_chunks():
    model = golden_model("xs")
    x, cond = random_condition(model, 2, 2)
    expected = model.denoise(x, 1.0, cond, BlockMajor(1))
    model.stream_layers("cpu")
    assert torch.equal(model.denoise(x, 1.0, cond, BlockMajor(1)), expected)
    stream = model._stream
    assert stream is not None
    for n in (2, 0, 0, 1, 3, 1):
        for key, value in model.layers[n].state_dict().items():
            assert torch.equal(stream[n].state_dict()[key], value)
        assert stream._held == [n, (n + 1) % model.config.num_layers]


def test_streaming_leaves_the_layers_where_they_are_and_holds_one_copy():
    model = golden_model("xs")
    before = {k: v.clone() for k, v in model.layers.state_dict().items()}
    model.stream_layers("cpu")
    x, cond = random_condition(model, 1, 2)
    model.denoise(x, 1.0, cond, LayerMajor(1))
    for key, value in model.layers.state_dict().items():
        assert torch.equal(value, before[key])
    assert set(model.state_dict()) == set(golden_model("xs").state_dict())


@pytest.mark.parametrize("run_out", [False, True])
def test_a_schedule_can_send_the_weights_to_the_host(run_out, monkeypatch):
    resident, streamed = golden_model("xs"), golden_model("xs")
    noise, cond = random_condition(resident, 3, 4)
    expected = sample(resident, cond, edm_sigmas(3), noise=noise)
    plans = [Plan(LayerMajor(2, tokens_on_host=True, stream_weights=True), 1, 0, 2.0)]
    if run_out:  # in the middle of sampling, with the weights on the device till then
        plans.insert(0, Plan(Full(), 2, 0, 1.0))
        fail_at(monkeypatch, 3 * resident.config.num_layers)
    result = sample(streamed, cond, edm_sigmas(3), noise=noise, retry=Adaptive(plans).call)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert streamed._stream is not None


def test_streamed_weights_are_what_is_predicted():
    model = golden_model("xs")
    model.stream_layers("meta")
    held = sum(p.nbytes for p in model.parameters() if p.device.type == "meta")
    held += 2 * sum(p.nbytes for p in model.layers[0].parameters())  # one computes, one comes
    assert weight_bytes(model.config, torch.float32, streamed=True) == held
    assert held < weight_bytes(model.config, torch.float32)
