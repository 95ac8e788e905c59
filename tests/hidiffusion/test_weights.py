"""Number formats, LoRA, weights that are offloaded, and compilation."""

import pytest
import torch

from tests.hidiffusion.models import base_model, sample

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("dtype", "manual_cast"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_weights_of_every_format(sdxl, apply, dtype, manual_cast):
    """One step, against float32 with the weights rounded as that format rounds them."""
    for weight in sdxl.model.diffusion_model.parameters():
        weight.data = weight.data.to(dtype).float()
    settings = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}
    other = base_model("sdxl", dtype, manual_cast)

    def error(patched):
        pair = [apply(m, **settings) if patched else m for m in (other, sdxl)]
        found, exact = (sample(m, steps=1, cfg=1.0) for m in pair)
        return (found - exact).norm() / exact.norm()

    # With random weights the shrunk features make the network more sensitive to every rounding:
    # a disturbed input shows the same in float32.
    assert error(patched=True) < 1e-5 + 10 * error(patched=False)


def test_a_lora_on_the_dilated_downsampler_counts(sdxl, apply):
    settings = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}
    key = "diffusion_model.input_blocks.6.0.op.weight"
    up, down = torch.randn(32, 4) * 0.2, torch.randn(4, 32 * 9) * 0.2
    change = (up @ down).reshape(32, 32, 3, 3)
    with_lora = apply(sdxl, **settings)
    assert with_lora.add_patches({key: ("diff", (change,))}, 1.0, 1.0)
    found = sample(with_lora, steps=3)

    baked = base_model("sdxl")
    baked.model.get_parameter(key).data += change
    torch.testing.assert_close(found, sample(apply(baked, **settings), steps=3))
    assert not torch.allclose(found, sample(apply(sdxl, **settings), steps=3))


def test_offloaded_weights(sdxl, apply):
    """Weights that ComfyUI casts for each call, as it does when memory is short."""
    patched = apply(sdxl, rau_net="aggressive")
    expected = sample(patched, steps=8)
    patched.detach()
    low = apply(base_model("sdxl"), rau_net="aggressive")
    low.load(low.load_device, lowvram_model_memory=1)
    assert low.model.model_lowvram
    assert low.model.diffusion_model.input_blocks[6][0].op.comfy_cast_weights
    torch.testing.assert_close(sample(low, steps=8), expected)


@pytest.mark.parametrize(
    ("first", "dilated", "phases"),
    [pytest.param(True, 0.3, 3, marks=pytest.mark.slow), (False, 1.0, 1)],
)
def test_a_compiled_model_has_one_graph_for_each_phase(
    sdxl, apply, first, dilated, phases, monkeypatch
):
    """With TorchCompileModel before our node and behind it."""
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # The attention of a machine without a GPU cannot be compiled into one graph.
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    for module in sdxl.model.diffusion_model.modules():  # half the layers, half the time
        if isinstance(module, attention.SpatialTransformer):
            del module.transformer_blocks[1:]
    settings = {"rau_net": "aggressive", "preset": "custom", "t1": 0.6}
    settings["aggressive_ratio"] = dilated
    expected = sample(apply(sdxl, **settings), steps=10, size=(16, 16))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = sdxl.clone() if first else apply(sdxl, **settings)
    set_torch_compile_wrapper(model, backend=backend)
    model = apply(model, **settings) if first else model
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = sample(model, steps=10, size=(16, 16))
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert len(graphs) == phases, "dilated, pooled, plain; the shifts make no difference"
        sample(model, steps=10, size=(16, 16), seed=9)
        assert len(graphs) == phases, "a second picture compiles nothing"
