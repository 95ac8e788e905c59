"""What users connect wrongly: refused with the name of the thing and the remedy, or harmless."""

import importlib

import pytest
import torch
from safetensors.torch import save_file

from tests.hidiffusion.models import base_model, prompts

pytestmark = pytest.mark.comfy


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 10, 12, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evaluations(comfy, monkeypatch) -> list:
    """Grows by one with every evaluation of the network."""
    net, seen = comfy.module("infdit_core.network.model").InfDiT, []
    forward = net.forward

    def counted(self, x, *args, **kwargs):
        if x.device.type != "meta":  # where the planner measures
            seen.append(1)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(net, "forward", counted)
    return seen


def ksampler(model, conditioning, latent):
    """What the node KSampler does, for two steps."""
    return importlib.import_module("nodes").common_ksampler(
        model, 0, 2, 1.0, "euler", "karras", conditioning, conditioning, latent
    )[0]["samples"]


def with_area(cond, area):
    """CONDITIONING after Conditioning (Set Area)."""
    return [[tensor, values | {"area": area}] for tensor, values in cond]


WRONG = {
    "Empty Latent Image, another size": (
        lambda right, cond: ({"samples": torch.zeros(1, 4, 8, 8)}, cond),
        r"expected the LATENT of Inf-DiT Conditioning, 64x64 px; got one of 8x8 px",
    ),
    "Empty Latent Image, the same size": (
        lambda right, cond: ({"samples": torch.zeros(1, 4, 64, 64)}, cond),
        r"expected the LATENT of Inf-DiT Conditioning, 64x64 px; got an empty one",
    ),
    "LatentUpscale": (
        lambda right, cond: ({"samples": right.repeat_interleave(2, -1)}, cond),
        r"expected the LATENT of Inf-DiT Conditioning, 64x64 px; got one of 128x64 px",
    ),
    "a latent of SDXL": (
        lambda right, cond: ({"samples": torch.rand(1, 4, 64, 64)}, cond),
        r"got one of 64x64 px and 4 channels",
    ),
    "Conditioning (Set Area)": (
        lambda right, cond: ({"samples": right}, with_area(cond, (4, 4, 0, 0))),
        r"expected conditioning of the whole picture; got one of an area. Remove",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_latent_or_area_is_refused_before_any_work(comfy, load, image, evaluations, kind):
    model, (change, message) = load("tiny")[0], WRONG[kind]
    cond, latent, _ = comfy.nodes["InfDiTConditioning"].execute(model, image, 4.0).args
    latent, cond = change(latent["samples"], cond)
    with pytest.raises(ValueError, match=f"^Inf-DiT: .*{message}"):
        ksampler(model, cond, latent)
    assert not evaluations


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_our_conditioning_in_another_model_is_named(comfy, load, image, family):
    model = base_model(family)
    ours = comfy.nodes["InfDiTConditioning"].execute(load("tiny")[0], image, 4.0).args[0]
    latent = {"samples": torch.rand(1, 4, 16, 16)}
    with pytest.raises(ValueError, match="Inf-DiT Conditioning: expected its CONDITIONING to be"):
        ksampler(model, ours, latent)
    assert ksampler(model, prompts()[0], latent).isfinite().all()


def test_core_nodes_that_change_conditioning_take_ours(comfy, load, image):
    core, model = importlib.import_module("nodes"), load("tiny")[0]
    cond, latent, _ = comfy.nodes["InfDiTConditioning"].execute(model, image, 4.0).args
    (zeroed,) = core.ConditioningZeroOut().zero_out(cond)
    (ranged,) = core.ConditioningSetTimestepRange().set_range(cond, 0.0, 1.0)
    expected = ksampler(model, cond, latent)
    assert torch.equal(ksampler(model, zeroed, latent), expected)
    assert torch.equal(ksampler(model, ranged, latent), expected)


def test_decode_says_sizes_as_people_do(comfy, load, image):
    canvas = comfy.nodes["InfDiTConditioning"].execute(load("tiny")[0], image, 6.0).args[2]
    message = "1 of 96x64 px and 3 channels; got 2 of 16x8 px and 4 channels"
    with pytest.raises(ValueError, match=f"Inf-DiT Decode: expected the LATENT .*{message}"):
        comfy.nodes["InfDiTDecode"].execute({"samples": torch.zeros(2, 4, 8, 16)}, canvas)


def patched(model, module: str, node: str, *inputs):
    """A model after a core node."""
    found = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    if hasattr(found, "execute"):
        return found.execute(model, *inputs)[0]
    return getattr(found(), found.FUNCTION)(model, *inputs)[0]


REFUSED = {
    "Self-Attention Guidance": ("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
    "Adaptive Projected Guidance": ("nodes_apg", "APG", 1.0, 5.0, 0.0),
    "RenormCFG": ("nodes_lumina2", "RenormCFG", 100.0, 1.0),
    "EasyCache": ("nodes_easycache", "EasyCacheNode", 0.2, 0.0, 1.0, False),
    "LazyCache": ("nodes_easycache", "LazyCacheNode", 0.2, 0.0, 1.0, False),
    "ModelSampling": ("nodes_model_advanced", "ModelSamplingDiscrete", "eps", False),
}
IDLE = {
    "PerturbedAttentionGuidance": ("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "CFGZeroStar": ("nodes_cfg", "CFGZeroStar"),
    "RescaleCFG": ("nodes_model_advanced", "RescaleCFG", 0.7),
    "HyperTile": ("nodes_hypertile", "HyperTile", 256, 2, 0, False),
    "TomePatchModel": ("nodes_tomesd", "TomePatchModel", 0.3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_spoils_or_stops_a_picture_is_refused_by_name(
    comfy, load, upscale, image, evaluations, name
):
    model = load("tiny")[0]
    conditioning, latent, _ = comfy.nodes["InfDiTConditioning"].execute(model, image, 4.0).args
    wrong = patched(model, *REFUSED[name])
    for run, who in (
        (lambda: upscale(wrong, image), "Inf-DiT Upscale"),
        (lambda: comfy.nodes["InfDiTConditioning"].execute(wrong, image, 4.0), "Conditioning"),
        (lambda: ksampler(wrong, conditioning, latent), "Inf-DiT"),
    ):
        with pytest.raises(ValueError, match=f"{who}: expected a model .* got one with {name}"):
            run()
    assert not evaluations


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_said_and_does_nothing(load, upscale, image, caplog, name):
    model = load("tiny")[0]
    result = upscale(patched(model, *IDLE[name]), image)
    torch.testing.assert_close(result, upscale(model, image), atol=1e-3, rtol=0)
    assert f"Inf-DiT: {name} is on the model and has no effect" in caplog.text


@pytest.mark.parametrize(
    "node",
    [
        ("nodes_differential_diffusion", "DifferentialDiffusion"),
        ("nodes_eps", "EpsilonScaling", 1.005),
    ],
)
def test_what_works_is_left_alone(load, upscale, image, caplog, node):
    assert upscale(patched(load("tiny")[0], *node), image).isfinite().all()
    assert "has no effect" not in caplog.text


def test_the_clip_loader_lists_files_with_a_clip(comfy, load):
    load("tiny")
    (item,) = comfy.nodes["InfDiTCLIPLoader"].define_schema().inputs
    assert item.options == ["clip.safetensors", "tower.safetensors"]
    late = comfy.models_dir / "infdit" / "late.safetensors"
    save_file({"visual.proj": torch.zeros(2, 2)}, late)
    (item,) = comfy.nodes["InfDiTCLIPLoader"].define_schema().inputs
    assert "late.safetensors" in item.options
    late.unlink()


@pytest.mark.parametrize(
    ("node", "inputs"), [("InfDiTCLIPLoader", ()), ("InfDiTCheckpointLoader", ("default",))]
)
def test_messages_of_the_loaders_hold_no_folder(comfy, load, node, inputs):
    folder = comfy.models_dir / "infdit"
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "text.safetensors").write_text("no model")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
            comfy.nodes[node].execute(name, *inputs)
        assert str(comfy.models_dir) not in str(error.value)
    save_file({"lora_up.weight": torch.zeros(2)}, folder / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors") as error:
        comfy.nodes[node].execute("lora.safetensors", *inputs)
    assert str(comfy.models_dir) not in str(error.value)


@pytest.mark.parametrize("flag", ["fp8_e4m3fn_unet", "fp8_e5m2_unet"])
def test_8_bit_layers_where_comfyui_was_told_8_bit(comfy, load, upscale, image, monkeypatch, flag):
    """The weights outside the layers have no scales: they stay as the device computes."""
    expected = upscale(load("tiny", "fp8 layers")[0], image)
    monkeypatch.setattr(importlib.import_module("comfy.cli_args").args, flag, True)
    model = load("tiny", "fp8 layers")[0]
    assert model.model.diffusion_model.net.final.linear.weight.dtype == torch.float32
    torch.testing.assert_close(upscale(model, image), expected)


def test_a_loader_that_comfyui_fails_is_named(comfy, load, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("fp8 on this device")

    loader = comfy.module("nodes.infdit.loader")
    monkeypatch.setattr(loader, "load_patcher", fail)
    with pytest.raises(ValueError, match=r"Load Inf-DiT Checkpoint: .*fp8 layers.*Choose bf16"):
        load("tiny", "fp8 layers")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_patches_refuse_what_is_no_number(comfy, value):
    """ComfyUI's check of ranges lets NaN pass."""
    with pytest.raises(
        ValueError, match=f"Upsample Guidance: expected a number for eta; got {value}"
    ):
        comfy.nodes["UpsampleGuidance"].execute(None, "auto", 1.0, value, 0.0, "same")
    with pytest.raises(ValueError, match=f"HiDiffusion: expected a number for t2; got {value}"):
        comfy.nodes["HiDiffusion"].execute(
            None, "auto", "auto", True, 0.4, value, 0.16, 0, "sampler steps"
        )
    settings = comfy.module("nodes.diffusehigh.guidance").Settings
    with pytest.raises(comfy.module("infdit_core.errors").InfDiTError, match="number for strength"):
        settings(5, value, 0.0, False, 1.0, 3, 0.1, 2.0, "db4", 1, 0)
