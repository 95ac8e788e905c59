"""Weights that ComfyUI casts when they are used: once a layer, whatever the number of chunks."""

import importlib
from collections import Counter

import pytest
import torch

from tests.goldens import TINY
from tests.nodes.test_weights import PREFIX, partly_loaded

pytestmark = pytest.mark.comfy


@pytest.fixture
def chunked(comfy):
    """A model that takes one layer at a time over chunks of one block."""

    def schedule(model):
        return comfy.nodes["InfDiTSchedule"].execute(model, "layer by layer", 1, False, 0.0).args[0]

    return schedule


@pytest.fixture
def meta_evaluation(comfy):
    """Run the network of a model on the meta device, as on one that its weights are not on."""

    def run(net):
        schedules = comfy.module("infdit_core.blocks.schedules")
        condition = comfy.module("infdit_core.network.condition").Condition
        side = 2 * TINY.block_px
        picture = torch.empty(1, 3, side, side, device="meta")
        cond = condition(picture, torch.empty(1, 3, side // 4, side // 4, device="meta"))
        net(picture, torch.ones(1, device="meta"), cond, schedules.LayerMajor(1))

    return run


def test_weights_on_another_device_are_copied_once_a_layer(
    comfy, load, meta_evaluation, monkeypatch
):
    management = importlib.import_module("comfy.model_management")
    sdpa = comfy.module("infdit_core.network.attention").sdpa
    model, copies, cast_to = load("tiny")[0], Counter(), management.cast_to

    def counted(weight, dtype=None, device=None, **options):
        copies[id(weight)] += weight.device != device
        return cast_to(weight, dtype, device, **options)

    with partly_loaded(model):
        monkeypatch.setattr(management, "cast_to", counted)
        monkeypatch.setattr(model.model.diffusion_model.net, "attend", sdpa)
        meta_evaluation(model.model.diffusion_model.net)
    names = {id(p): name for name, p in model.model.diffusion_model.net.named_parameters()}
    found = {names[key]: count for key, count in copies.items() if key in names}
    again = {name for name, count in found.items() if count > 1}
    # the first is wanted before its layer has begun, the other is small and kept with every layer
    assert {name.rpartition(".")[0] for name in again} <= {"patch_embed", "final.linear"}
    assert {name for name in names.values() if name.startswith("layers.")} <= found.keys()


def weight_functions(net):
    return [getattr(module, "weight_function", None) for module in net.modules()]


def test_patches_are_added_once_a_layer_and_change_nothing_else(
    load, upscale, chunked, monkeypatch
):
    patcher, image = importlib.import_module("comfy.model_patcher"), torch.rand(1, 20, 12, 3)
    model = chunked(load("tiny")[0])
    plain = upscale(model, image, steps=1)
    net = model.model.diffusion_model.net
    model.add_patches(
        {
            f"{PREFIX}{name}": ("diff", (torch.randn_like(value) / 20,))
            for name, value in net.named_parameters()
            if name.startswith(("layers.", "cross_attention."))
        }
    )
    expected = upscale(model, image, steps=1)
    assert (expected - plain).abs().max() > 1e-3

    calls, call = Counter(), patcher.LowVramPatch.__call__

    def counted(self, weight):
        calls[self.key] += 1
        return call(self, weight)

    monkeypatch.setattr(patcher.LowVramPatch, "__call__", counted)
    with partly_loaded(model):
        before, functions = dict(net.named_parameters()), weight_functions(net)
        result = upscale(model, image, steps=1)
        assert all(value is before[name] for name, value in net.named_parameters())
        assert weight_functions(net) == functions
    torch.testing.assert_close(result, expected)
    assert calls.keys() == model.patches.keys()
    assert set(calls.values()) == {1}


def test_weights_under_dynamic_vram_come_by_comfyuis_own_prefetching(comfy, load, monkeypatch):
    prefetch = importlib.import_module("comfy.model_prefetch")
    casting, pops = comfy.module("nodes.infdit.casting"), []
    net = load("tiny")[0].model.diffusion_model.net
    streamed = [layer.mlp.fc1 for layer in net.layers]
    for module in streamed:
        monkeypatch.setattr(module, "_v", "its place in virtual memory", raising=False)
        monkeypatch.setattr(module, "comfy_cast_weights", True)

    def pop(queue, device, module):
        if queue is not None:
            queue.pop(0)
            pops.append(queue[0] and [m for m in queue[0].modules() if hasattr(m, "_v")])

    monkeypatch.setattr(prefetch, "make_prefetch_queue", lambda parts, *_: [None, *parts, None])
    monkeypatch.setattr(prefetch, "prefetch_queue_pop", pop)
    before = dict(net.named_parameters())
    weights = casting._LayerWeights(net, torch.device("meta"), torch.float32)
    for n in (0, 0, 1, 1):
        weights.hold(n)
        assert streamed[n].weight is before[f"layers.{n}.mlp.fc1.weight"]
    weights.release()
    assert pops == [[streamed[0]], None, [streamed[1]], None]
