"""What ComfyUI does with the weights of a model: merging, LoRA and loading in part."""

import importlib
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from tests.goldens import TINY, random_tensors

pytestmark = pytest.mark.comfy

PREFIX = "diffusion_model.net."
TABLES = ("layers.1.attention.segment_embed", "cross_attention.query_position",
          "cross_attention.key_position")  # fmt: skip
"""Learned vectors that are added, and multiply nothing."""


def weights(patcher) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in patcher.model.diffusion_model.state_dict().items()}


@contextmanager
def partly_loaded(patcher, share: float = 0.01):
    """All but a share of the weights stay where they are, and are cast when they are used."""
    management, cpu = importlib.import_module("comfy.model_management"), torch.device("cpu")
    patcher.unpatch_model(cpu)
    patcher.patch_model(cpu, share * patcher.model_size())
    assert patcher.model.model_lowvram
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "load_models_gpu", lambda *args, **kwargs: None)
        yield
    patcher.unpatch_model(cpu)


def test_every_parameter_is_a_weight_or_bias_that_comfyui_can_cast(load):
    """ComfyUI's loader skips parameters of modules that have parts."""
    for name in ("vector", "prior"):
        for path, module in load(name)[0].model.diffusion_model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            assert own.keys() <= {"weight", "bias"}, path
            if own:
                assert not list(module.children()), path
                assert hasattr(module, "comfy_cast_weights"), path


def test_merged_models_have_the_mean_of_all_weights(comfy, load):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    save_file(random_tensors(TINY, seed=1), comfy.models_dir / "infdit" / "other.safetensors")
    one, other = load("tiny")[0], load("other")[0]
    (merged,) = ModelMergeSimple().merge(one, other, 0.25)
    parts = weights(one), weights(other)
    means = {key: parts[0][key] * 0.25 + parts[1][key] * 0.75 for key in parts[0]}
    merged.patch_model(torch.device("cpu"))
    for key, value in weights(merged).items():
        torch.testing.assert_close(value, means[key], msg=key)
    merged.unpatch_model(torch.device("cpu"))


def test_a_patch_on_positions_acts_loaded_in_whole_and_in_part(load, upscale):
    model, image = load("tiny")[0], torch.rand(1, 20, 12, 3)
    plain = upscale(model, image, steps=1)
    net = model.model.diffusion_model.net
    for name in TABLES:
        module = net.get_submodule(name)
        patched, difference = model.clone(), torch.randn_like(module.weight)
        patch = {f"{PREFIX}{name}.weight": ("diff", (difference,))}
        assert patched.add_patches(patch) == list(patch)
        by_patch = upscale(patched, image, steps=1)
        assert (by_patch - plain).abs().max() > 1e-3

        with partly_loaded(patched):
            assert len(module.weight_function) == 1
            assert torch.equal(upscale(patched, image, steps=1), by_patch)
    torch.testing.assert_close(upscale(model, image, steps=1), plain)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("schedule", ["whole picture", "layer by layer"])
def test_8_bit_layers_partly_loaded_and_with_a_patch(
    comfy, load, upscale, monkeypatch, schedule, fast
):
    """`fast` is a device that multiplies 8-bit numbers: inputs are rounded, too."""
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "supports_fp8_compute", lambda device=None: fast)
    model, image = load("tiny", "fp8 layers")[0], torch.rand(1, 20, 12, 3)
    model = comfy.nodes["InfDiTSchedule"].execute(model, schedule, 1, False, 0.0).args[0]
    layer = model.model.infdit.layers[0].mlp.fc1
    assert layer._full_precision_mm is not fast
    expected = upscale(model, image, steps=1)
    with partly_loaded(model):
        assert type(layer.weight).__name__ == "QuantizedTensor"
        torch.testing.assert_close(upscale(model, image, steps=1), expected)

    patch = {f"{PREFIX}layers.0.mlp.fc1.weight": ("diff", (torch.randn(TINY.mlp_size, 32) / 4,))}
    patched = model.clone()
    assert patched.add_patches(patch)
    changed = upscale(patched, image, steps=1)
    moved = (changed - expected).abs().mean()
    with partly_loaded(patched):
        assert layer.weight_function
        assert (upscale(patched, image, steps=1) - changed).abs().mean() < moved / 4


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_a_clip_tower_is_loaded_in_whole_or_not_at_all(load, monkeypatch, state):
    """Its layers are open_clip's: ComfyUI does not cast what it left elsewhere."""
    management, meta = importlib.import_module("comfy.model_management"), torch.device("meta")
    clip = load("clip")[1]
    monkeypatch.setattr(management, "vram_state", getattr(management.VRAMState, state))
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: clip.patcher.size * 1.5)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "free_memory", lambda *_, **__: [])
    monkeypatch.setattr(clip.patcher, "load_device", meta)
    seen = []
    monkeypatch.setattr(clip.guide, "guide", lambda image, *_: seen.append(image.device) or image)
    clip.vector(torch.rand(1, 30, 40, 3))
    devices = {parameter.device for parameter in clip.guide.model.parameters()}
    assert devices == {meta if state == "LOW_VRAM" else torch.device("cpu")}
    assert seen == [torch.device("cpu")], "antialiased resizing is not there on every device"
