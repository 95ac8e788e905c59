"""Upsample Guidance beside HiDiffusion, ControlNet and the patches of other nodes."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.hidiffusion.models import sample
from tests.hidiffusion.test_beside_others import control_net, core_node
from tests.upsample_guidance.models import conditions, evaluate, watch

pytestmark = pytest.mark.comfy

SIZE = (32, 32)


def plans(model):
    """Record (low, RAD, pool, windows) of HiDiffusion in every call of the UNet."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def look(executor, x, timesteps, context, y, control, options, **kwargs):
        changes = options["hidiffusion"]
        low = bool(options.get("upsample_guidance_low"))
        seen.append((low, changes.rad, changes.pool, len(changes.windows), changes.sizes.inputs[0]))
        return executor(x, timesteps, context, y, control, options, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    return seen


@pytest.mark.parametrize("rau_net", ["auto", "normal", "aggressive"])
def test_hidiffusion_before_or_after_is_the_same(sdxl, apply, hidiffusion, rau_net):
    settings = {"rau_net": rau_net, "preset": "custom", "t1": 1.0, "t2": 1.0}
    both = apply(hidiffusion(sdxl, **settings)), hidiffusion(apply(sdxl), **settings)
    seen = [plans(model) for model in both]
    results = [sample(model, steps=5, size=SIZE) for model in both]
    assert torch.equal(*results)
    assert seen[0] == seen[1]
    small, large = ([s for s in seen[0] if s[0] is low] for low in (True, False))
    assert len(small) == 3
    assert {s[1:] for s in small} == {(False, False, 10, (16, 16))}, "native size, and windowed"
    assert {s[4] for s in large} == {SIZE}
    if rau_net == "normal":
        assert {s[1:3] for s in large} == {(True, True)}
    if rau_net == "aggressive":
        assert {s[1] or s[2] for s in large} == {True}


def test_hidiffusion_leaves_the_composition_to_it_in_auto(sdxl, apply, hidiffusion):
    """Both keep it whole; RAU-Net on top is for those who ask for it."""
    guided, alone = hidiffusion(apply(sdxl)), hidiffusion(sdxl)
    for model, active in ((guided, False), (alone, True)):
        for wrappers in model.wrappers.values():  # as if the model were made for a side of 16
            patch = wrappers["hidiffusion"][0].__self__
            patch = replace(patch, family=replace(patch.family, native=16))
            wrappers["hidiffusion"] = [getattr(patch, wrappers["hidiffusion"][0].__name__)]
        seen = plans(model)
        sample(model, steps=10, size=SIZE)
        assert any(rad or pool for _, rad, pool, *_ in seen) is active


def test_no_controlnet_residual_is_dropped(sdxl, apply, caplog):
    control = control_net()
    for model in (sdxl, apply(sdxl)):
        with caplog.at_level(logging.WARNING):
            with_control = sample(model, steps=2, control=control, size=(24, 36))
        assert "control could not be applied" not in caplog.text
        assert not torch.allclose(with_control, sample(model, steps=2, size=(24, 36)))


def test_both_calls_get_the_residuals(sdxl, apply):
    from comfy.patcher_extension import WrappersMP

    patched, seen = apply(sdxl), []

    def look(executor, x, timesteps, context, y, control, options, **kwargs):
        seen.append({name: list(part) for name, part in control.items()})
        return executor(x, timesteps, context, y, control, options, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    sizes = [(24, 36), (12, 18), (6, 9)]
    channels = [32] * 7 + [64] * 2
    output = [torch.randn(1, c, *sizes[i // 3]) for i, c in enumerate(channels)]
    control = {"output": output, "middle": [torch.randn(1, 64, 6, 9)]}
    before = {name: list(part) for name, part in control.items()}
    x = 5 * torch.randn(1, 4, 24, 36)
    evaluate(patched, x, 5.0, conditions("sdxl", 1) | {"control": control})
    low, high = seen
    for name, part in before.items():
        assert all(a is b for a, b in zip(high[name], part, strict=True))
        for small, large in zip(low[name], part, strict=True):
            size = tuple(-(-n // 2) for n in large.shape[-2:])
            assert torch.equal(small, F.interpolate(large, size, mode="bicubic"))


@pytest.mark.parametrize("first", [True, False])
def test_the_wrappers_of_other_nodes_are_inside(sdxl, apply, first):
    """Those that ComfyUI would run first, too: each sees both calls."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def count(executor, x, *args, **kwargs):
        seen.append(x.shape[-1])
        return executor(x, *args, **kwargs)

    other = sdxl.clone()
    other.add_wrapper(WrappersMP.APPLY_MODEL, count)
    patched = apply(other)
    if not first:
        patched = apply(sdxl)
        patched.add_wrapper(WrappersMP.APPLY_MODEL, count)
    sample(patched, steps=1, size=SIZE)
    assert seen == [16, 32]


def test_the_second_of_two_nodes_wins_and_says_so(sdxl, apply, caplog):
    expected = sample(apply(sdxl, theta=0.5), steps=2)
    with caplog.at_level(logging.WARNING):
        twice = apply(apply(sdxl, scale="4"), theta=0.5)
    assert "this node wins" in caplog.text
    assert torch.equal(sample(twice, steps=2), expected)


def test_self_attention_guidance_and_freeu_keep_working(sdxl, apply):
    sag = core_node("nodes_sag", "SelfAttentionGuidance")
    free = core_node("nodes_freelunch", "FreeU_V2")

    def guide(model):
        return sag.execute(model, 0.5, 2.0).args[0]

    def free_u(model):
        return free.execute(model, 1.3, 1.4, 0.9, 0.2).args[0]

    plain = sample(apply(sdxl), steps=2, size=SIZE)
    for dress in (guide, free_u):
        before, after = apply(dress(sdxl)), dress(apply(sdxl))
        seen = watch(before)
        result = sample(before, steps=2, size=SIZE)
        assert any(low for *_, low in seen)
        assert torch.equal(sample(after, steps=2, size=SIZE), result)
        assert result.isfinite().all()
        assert not torch.allclose(result, plain)


def test_easycache_skips_large_evaluations_alone(sdxl, apply):
    cache = core_node("nodes_easycache", "EasyCacheNode")
    cached = cache.execute(apply(sdxl), 0.5, 0.15, 0.95, False).args[0]
    seen = watch(cached)  # its wrapper comes first: it leaves out what would be seen here
    assert sample(cached, steps=12, size=SIZE).isfinite().all()
    assert sum(low for *_, low in seen) == 7, "every guided step of the twelve"
    assert sum(not low for *_, low in seen) < 12
