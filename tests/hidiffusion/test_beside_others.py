"""HiDiffusion beside ControlNet and the patches of other nodes."""

import importlib
import logging
from collections import defaultdict

import pytest
import torch

from tests.hidiffusion.models import base_model, residuals, sample

pytestmark = pytest.mark.comfy


def control_net():
    from comfy.controlnet import ControlBase

    class Constant(ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            b, _, h, w = x_noisy.shape
            return residuals(b, h, w)

    return Constant()


@pytest.mark.parametrize("rau_net", ["off", "aggressive"])
def test_no_controlnet_residual_is_dropped(sdxl, apply, rau_net, caplog):
    control = control_net()
    patched = apply(sdxl, rau_net=rau_net)
    with caplog.at_level(logging.WARNING):
        with_control = sample(patched, control=control)
    assert "control could not be applied" not in caplog.text
    assert not torch.allclose(with_control, sample(patched))


def core_node(file, name):
    return getattr(importlib.import_module(f"comfy_extras.{file}"), name)


def test_the_second_of_two_nodes_wins_and_says_so(sdxl, apply, caplog):
    once = apply(sdxl, rau_net="off", seed=5)
    expected = sample(once, steps=3)
    with caplog.at_level(logging.WARNING):
        twice = apply(apply(sdxl, rau_net="aggressive", seed=1), rau_net="off", seed=5)
    assert "this node wins" in caplog.text
    assert torch.equal(sample(twice, steps=3), expected)


@pytest.mark.parametrize("first", [True, False])
def test_deep_shrink_wins_over_rau_net(sdxl, apply, caplog, first):
    node = core_node("nodes_model_downscale", "PatchModelAddDownscale")

    def shrink(model):
        return node.execute(model, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic").args[0]

    both = apply(shrink(sdxl), rau_net="aggressive", window_attention=False)
    if not first:
        both = shrink(apply(sdxl, rau_net="aggressive", window_attention=False))
    with caplog.at_level(logging.WARNING):
        result = sample(both, steps=5)
    assert "Deep Shrink" in caplog.text
    assert "RAU-Net is off" in caplog.text
    assert torch.equal(result, sample(shrink(sdxl), steps=5))


@pytest.mark.parametrize("first", [True, False])
def test_hypertile_wins_where_it_tiles(sdxl, apply, caplog, first):
    node = core_node("nodes_hypertile", "HyperTile")

    def tile(model):
        # Depth 1 is the level of the windows; HyperTile draws nothing with a swap size of 1.
        return node.execute(model, 128, 1, 1, False)[0]

    both = apply(tile(sdxl), rau_net="off") if first else tile(apply(sdxl, rau_net="off"))
    with caplog.at_level(logging.WARNING):
        result = sample(both, steps=3, size=(64, 64))
    assert "HyperTile" in caplog.text
    torch.testing.assert_close(result, sample(tile(sdxl), steps=3, size=(64, 64)))


BOTH_SHRINKINGS = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}


def sag(model):
    return core_node("nodes_sag", "SelfAttentionGuidance").execute(model, 0.5, 2.0).args[0]


# Middles of 2×1 and 2×2 tokens, for which core finds no height and width.
@pytest.mark.parametrize("size", [(40, 24), (52, 33)])
def test_self_attention_guidance_gets_a_map_of_the_plain_size(comfy, apply, monkeypatch, size):
    nodes_sag = importlib.import_module("comfy_extras.nodes_sag")
    blur, maps = nodes_sag.create_blur_map, []

    def look(x0, attention, *args):
        maps.append(tuple(attention.shape[1:]))
        return blur(x0, attention, *args)

    monkeypatch.setattr(nodes_sag, "create_blur_map", look)
    model, settings = base_model("sd15"), BOTH_SHRINKINGS | {"t1": 0.5, "t2": 0.5}
    before, after = apply(sag(model), **settings), sag(apply(model, **settings))
    result = sample(before, steps=2, size=size)
    tokens = -(-size[0] // 8) * -(-size[1] // 8)
    assert maps == [(tokens, tokens)] * 2, "in a shrunk step and in a plain one"
    assert torch.equal(sample(after, steps=2, size=size), result)
    assert result.isfinite().all()


def test_self_attention_guidance_is_unchanged_where_core_reads_its_map(hi, apply, monkeypatch):
    """Latents of 64×64 have a middle of 2×2 in place of 8×8: exactly enlarged, so the same mask."""
    model = base_model("sd15")
    both = sag(apply(model, **BOTH_SHRINKINGS))
    result = sample(both, steps=1, size=(64, 64))
    plain = sample(apply(model, **BOTH_SHRINKINGS), steps=1, size=(64, 64))
    assert (result - plain).norm() > 0.01 * plain.norm(), "it has its effect"
    monkeypatch.setattr(hi, "_is_sag", lambda patch: False)
    torch.testing.assert_close(sample(both, steps=1, size=(64, 64)), result)


def ip_adapter(model, seen):
    """Attends to a picture as well in every cross-attention, where a mask allows."""
    model = model.clone()
    picture = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(7))

    def attend(q, k, v, options):
        from comfy.ldm.modules.attention import optimized_attention

        h, w = options["activations_shape"][-2:]
        assert q.shape[1] == h * w, "a mask of the features' size fits the tokens"
        seen.add((*options["block"], options["block_index"]))
        mask = (torch.arange(h * w) % w < w // 2)[:, None]
        heads = options["n_heads"]
        added = (picture @ torch.ones(32, q.shape[-1])).expand(len(q), -1, -1)
        return optimized_attention(q, k, v, heads) + mask * optimized_attention(
            q, added, added, heads
        )

    for block in [("input", i) for i in (4, 5, 7, 8)] + [("output", i) for i in range(6)]:
        for index in (0, 1):
            model.set_model_attn2_replace(attend, *block, index)
    return model


def test_ip_adapter_and_freeu_keep_working(sdxl, apply):
    free = core_node("nodes_freelunch", "FreeU_V2")
    settings = BOTH_SHRINKINGS
    seen = set()

    def adapt(model):
        return ip_adapter(model, seen)

    def free_u(model):
        return free.execute(model, 1.3, 1.4, 0.9, 0.2).args[0]

    plain = sample(apply(sdxl, **settings), steps=2)
    for dress in (adapt, free_u):
        before, after = apply(dress(sdxl), **settings), dress(apply(sdxl, **settings))
        result = sample(before, steps=2)
        assert torch.equal(sample(after, steps=2), result)
        assert (result - plain).norm() > 0.01 * plain.norm(), "it has its effect"
    assert len(seen) == 20


def test_other_patches_keep_working(sdxl, apply):
    """Patches of cross-attention and of output blocks, and one more for down-samplers."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

    called = defaultdict(set)

    def attention(q, k, v, options):
        called["attn2"].add(options["block"])
        return q, k, v * 1.1

    def output(h, skip, options):
        called["output"].add(options["block"])
        return (h * 1.1 if options["block"][1] == 1 else h), skip

    def downsample(layer, x, *args):
        called["down"].add((x.shape[-2], layer(x).shape[-2]))
        return layer(x)

    def dress(model):
        model = model.clone()
        model.set_model_attn2_patch(attention)
        model.set_model_output_block_patch(output)
        model.set_model_forward_timestep_embed_patch((Downsample, downsample))
        return model

    settings = BOTH_SHRINKINGS
    results = []
    for both in (apply(dress(sdxl), **settings), dress(apply(sdxl, **settings))):
        called.clear()
        results.append(sample(both, steps=2, size=(32, 32)))
        assert len(called["attn2"]) == 11
        assert len(called["output"]) == 9
        assert called["down"] == {(32, 16), (4, 2)}, "pooled to 8, every second pixel, halved"
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(apply(sdxl, **settings), steps=2, size=(32, 32)))
