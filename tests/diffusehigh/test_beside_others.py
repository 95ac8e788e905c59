"""DiffuseHigh beside HiDiffusion, ControlNet, IP-Adapter-like patches and LoRA."""

import logging

import pytest
import torch

from tests.diffusehigh.models import assert_same_state, prompts, state
from tests.hidiffusion.models import DEFAULTS, watch
from tests.hidiffusion.test_beside_others import control_net, ip_adapter

pytestmark = pytest.mark.comfy
SHORT = {"scales": "1.5", "last_steps": 3, "guided_steps": 1}


@pytest.fixture
def hidiffusion(comfy):
    def run(model, **settings):
        return comfy.nodes["HiDiffusion"].execute(model, **DEFAULTS | settings).args[0]

    return run


def test_of_hidiffusion_window_attention_works_alone(loop, hidiffusion, sdxl, caplog):
    """In sizes of whole windows, and RAU-Net stays on the model for other samplers."""
    from tests.hidiffusion.models import sample

    model = hidiffusion(sdxl, rau_net="aggressive")
    seen = watch(model)
    with caplog.at_level(logging.INFO):
        result, latent = loop(model, **SHORT)
    assert "RAU-Net is off" in caplog.text
    assert "dilated down-sampler: none; pooled features: none; window attention: on" in caplog.text
    assert result.shape == (1, 128, 128, 3)
    assert len(seen) == 3
    assert not any(rad or pool for _, rad, pool, *_ in seen)
    assert all(windows for *_, windows, _, _ in seen)
    alone = loop(hidiffusion(sdxl, rau_net="off"), **SHORT)[1]
    assert torch.equal(latent["samples"], alone["samples"])
    assert not torch.equal(alone["samples"], loop(sdxl, **SHORT | {"scales": "2"})[1]["samples"])
    seen.clear()
    sample(model, steps=8)
    assert any(rad for _, rad, *_ in seen)


def test_controlnet_acts_in_every_stage(loop, sdxl):
    sizes, control = [], control_net()
    get = control.get_control

    def look(x, *args):
        sizes.append(tuple(x.shape[-2:]))
        return get(x, *args)

    control.get_control = look
    positive, negative = prompts(control=control, control_apply_to_uncond=True)
    settings = {"scales": "1.5, 2", "last_steps": 2, "guided_steps": 1}
    found, _ = loop(sdxl, positive=positive, negative=negative, **settings)
    assert set(sizes) == {(12, 12), (16, 16)}
    assert not torch.allclose(found, loop(sdxl, **settings)[0])


def test_ip_adapter_and_other_attention_patches_keep_working(loop, sdxl):
    seen, values = set(), []

    def attention(q, k, v, options):
        values.append(options["block"])
        return q, k, v * 1.1

    patched = sdxl.clone()
    patched.set_model_attn2_patch(attention)
    plain, _ = loop(sdxl, **SHORT)
    for model in (ip_adapter(sdxl, seen), patched):
        before = state(model)
        assert not torch.allclose(loop(model, **SHORT)[0], plain)
        assert_same_state(before, model)
    assert len(seen) == 20
    assert len(set(values)) == 11


def test_other_post_cfg_functions_see_the_guided_prediction(guide, sdxl):
    from tests.diffusehigh.test_sampling import sample

    def halve(args):
        return args["denoised"] * 0.5

    first, second = sdxl.clone(), guide(sdxl)
    first.set_model_sampler_post_cfg_function(halve)
    second.set_model_sampler_post_cfg_function(halve)
    expected = sample(guide(sdxl), steps=1) * 0.5
    torch.testing.assert_close(sample(second, steps=1), expected)
    assert not torch.allclose(sample(guide(first), steps=1), expected)
