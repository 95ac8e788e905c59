"""DiMR's nodes: what they take, and what they say to all else."""

import importlib
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from infdit_core.dimr.config import G_2R, XL_2R
from infdit_core.dimr.load import load_model
from infdit_core.dimr.memory import sampling_bytes
from infdit_core.memory.live_bytes import LiveBytes
from tests.goldens import golden_path
from tests.hidiffusion.models import DEFAULTS as HIDIFFUSION
from tests.hidiffusion.models import base_model, prompts
from tests.hidiffusion.models import sample as sample_unet
from tests.nodes.test_weights import partly_loaded
from tests.upsample_guidance.models import DEFAULTS as UPSAMPLE_GUIDANCE

pytestmark = pytest.mark.comfy


def ksampler(model, conds, side=32, channels=4):
    from nodes import KSampler

    latent = {"samples": torch.zeros(1, channels, side, side)}
    return KSampler().sample(
        model, 0, 1, 1.4, "euler", "normal", *conds, latent, 1.0
    )[0]["samples"]  # fmt: skip


# ---- files


def test_a_pickle_and_a_safetensors_file_give_the_same_weights(comfy, dimr):
    folder = comfy.models_dir / "infdit"
    state = load_file(golden_path("dimr/tiny_2r.safetensors"))
    torch.save(OrderedDict(state), folder / "released.pth")
    models = [dimr(name=name) for name in ("2r.safetensors", "released.pth")]
    one, other = (model.model.diffusion_model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    heads = [model.model.dimr_config.stages[0].heads for model in models]
    assert heads == [4, 16], "as the metadata say, and as in the released files"


def test_the_list_has_the_files_of_dimr_alone(comfy, dimr, load):
    node = comfy.nodes["DiMRLoader"]
    (folder := comfy.models_dir / "infdit").joinpath("page.pth").write_text("<html>")
    dimr()
    load("tiny")
    names = node.define_schema().inputs[0].options
    assert "2r.safetensors" in names
    assert not {"tiny.safetensors", "page.pth", "infdit_small.safetensors"} & set(names)
    assert node.validate_inputs("2r.safetensors") is True
    version = node.fingerprint_inputs("page.pth")
    torch.save(load_file(golden_path("dimr/tiny_2r.safetensors")), folder / "page.pth")
    assert node.fingerprint_inputs("page.pth") != version
    said = node.validate_inputs("DiMR-XL_2R_800epochs.pth")
    assert "'DiMR-XL_2R_800epochs.pth' is not there" in said
    assert "huggingface.co/QHL067/DiMR" in said


def test_each_loader_names_the_others_file(comfy, dimr, load):
    dimr()
    load("tiny")
    with pytest.raises(ValueError, match=r"DiMR Loader: tiny\.safetensors is an Inf-DiT checkp"):
        dimr(name="tiny.safetensors")
    message = r"Load Inf-DiT Checkpoint: 2r\.safetensors is a DiMR checkpoint"
    with pytest.raises(ValueError, match=message):
        load("2r")
    (comfy.models_dir / "infdit" / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match=r"DiMR Loader: page\.pth is a text file") as raised:
        dimr(name="page.pth")
    assert str(comfy.models_dir) not in str(raised.value)


# ---- weights


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_that_of_the_engine(dimr, custom, dtype):
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model, noise = dimr(dtype), torch.randn(1, 4, 32, 32)
    net = model.model.diffusion_model.net
    assert {parameter.dtype for parameter in net.parameters()} == {kind}
    model.model.manual_cast_dtype = None  # which a CPU has
    x = torch.randn(1, 4, 32, 32).to(kind)
    half = load_model(golden_path("dimr/tiny_2r.safetensors"), dtype=kind, heads=4)
    t, classes = torch.tensor([0.5]), torch.tensor([3])
    given = model.model.diffusion_model(x, 1000 * t - 1, classes=classes)
    assert torch.equal(given, half(x, t, classes))
    exact = custom(dimr(), noise, 3, 4)
    assert 0 < (custom(model, noise, 3, 4) - exact).norm() / exact.norm() < 0.05


def test_every_parameter_is_a_weight_or_bias_that_comfyui_can_cast(dimr):
    for path, module in dimr().model.diffusion_model.named_modules():
        if own := dict(module.named_parameters(recurse=False)):
            assert own.keys() <= {"weight", "bias"}, path
            assert not list(module.children()), path
            assert hasattr(module, "comfy_cast_weights"), path


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_partly_loaded_with_patches_on_them(dimr, custom, dtype):
    """fp16 is cast to float32 on a CPU: manual cast."""
    model, noise = dimr(dtype), torch.randn(1, 4, 32, 32)
    plain = custom(model, noise, 3, 2)
    patched = model.clone()
    weights = dict(model.model.named_parameters())
    names = (
        "stages.1.position",
        "stages.0.blocks.0.mixer.norm.scale.rows",
        "stages.0.class_embed",
        "stages.1.enlarge.linear",
        "stages.1.blocks.0.mixer.conv",
    )
    keys = [f"diffusion_model.net.{name}.weight" for name in names]
    patch = {key: ("diff", (torch.randn(weights[key].shape) / 8,)) for key in keys}
    assert set(patched.add_patches(patch)) == set(keys)
    moved = custom(patched, noise, 3, 2)
    assert (moved - plain).abs().max() > 1e-2
    with partly_loaded(patched):
        found = custom(patched, noise, 3, 2)
    assert (found - moved).norm() / moved.norm() < (1e-6 if dtype == "fp32" else 2e-3)
    assert torch.equal(custom(model, noise, 3, 2), plain)


def test_loras_of_other_models_change_nothing(dimr, custom):
    sd, noise = importlib.import_module("comfy.sd"), torch.randn(1, 4, 32, 32)
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    model = dimr()
    changed, _ = sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert torch.equal(custom(changed, noise, 3, 1), custom(model, noise, 3, 1))


def test_comfyui_builds_the_model_anew_where_it_asks_for_it(comfy, dimr):
    load, arguments = dimr().cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again.model).__name__ == "DiMRModel"
    assert again.model_size() == dimr().model_size()


def test_the_memory_that_sampling_asks_for(dimr):
    """Equal to the live bytes of an evaluation; the released ones by the same count."""
    model = dimr().model
    x, t = torch.randn(2, 4, 32, 32), torch.full((2,), 500.0)
    with torch.inference_mode(), LiveBytes() as counted:
        model.diffusion_model(x, t, classes=torch.tensor([1, 2]))
    asked = model.memory_required([2, 4, 32, 32])
    assert 0.9 * counted.peak < asked < 1.3 * counted.peak
    sizes = [sampling_bytes(config, 1, torch.float16) / 1e6 for config in (XL_2R, G_2R)]
    assert 50 < sizes[0] < sizes[1] < 1000


# ---- classes


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", [207]),
        ("3", [3]),
        ("goldfish, 207\nGOLDEN RETRIEVER,,", [1, 207, 207]),
        ("cardigan, Cardigan", [474, 264]),
        ("great white, 1000, 207 golden retriever", [2, 1000, 207]),
    ],
)
def test_classes_by_number_and_by_name(comfy, text, numbers):
    chosen, none = comfy.nodes["DiMRClass"].execute("207 golden retriever", text).args
    assert list(chosen[0][1]["dimr_classes"]) == numbers
    assert none[0][1]["dimr_classes"] == (1000,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1001", "expected a class from 0 to 999, or 1000 for none; got 1001"),
        ("-3", "got '-3', which no name contains"),
        ("unicorn", "expected the number or the name of an ImageNet class; got 'unicorn'"),
        ("CARDIGAN", "which 2 names contain: 264 Cardigan, 474 cardigan$"),
        ("terrier", r"which \d\d names contain: (\d+ [^,]*terrier[^,]*, ){10}\.\.\.$"),
    ],
)
def test_what_is_no_class(comfy, text, message):
    with pytest.raises(ValueError, match=f"DiMR Class: .*{message}"):
        comfy.nodes["DiMRClass"].execute("0 tench", text)


# ---- what does not fit together


def test_conditioning_of_the_one_model_on_the_other(comfy, dimr, classes, load):
    model = dimr()
    with pytest.raises(ValueError, match=r"DiMR: expected conditioning from the DiMR Class node"):
        ksampler(model, prompts())
    node = comfy.nodes["InfDiTConditioning"]
    upscaler = load("tiny")[0]
    cond, latent = node.execute(upscaler, torch.rand(1, 8, 8, 3), 2.0).args[:2]
    with pytest.raises(ValueError, match=r"DiMR: expected conditioning from the DiMR Class node"):
        ksampler(model, (cond, cond))
    with pytest.raises(ValueError, match="expected conditioning from the Inf-DiT Conditioning"):
        ksampler(upscaler, classes(3), latent["samples"].shape[-1], 3)
    error = comfy.module("infdit_core.errors").InfDiTError
    for name in ("sdxl", "sd15"):
        with pytest.raises(error, match=r"DiMR Class: expected .* model from DiMR Loader"):
            ksampler(base_model(name), classes(3))


@pytest.mark.parametrize(
    ("shape", "got"), [((64, 4), "512x512 px, 4 channels"), ((32, 16), "256x256 px, 16 channels")]
)
def test_latents_of_another_shape(comfy, dimr, classes, monkeypatch, shape, got):
    sample = importlib.import_module("comfy.sample")
    monkeypatch.setattr(sample, "fix_empty_latent_channels", lambda model, latent, *_: latent)
    message = rf"DiMR: expected an empty latent of 256x256 px, 4 channels; got one of {got}\."
    with pytest.raises(ValueError, match=message):
        ksampler(dimr(), classes(3), *shape)


def test_parts_of_the_picture(comfy, dimr, classes):
    from nodes import ConditioningSetArea, ConditioningSetMask

    positive, negative = classes(3)
    (area,) = ConditioningSetArea().append(positive, 128, 128, 0, 0, 1.0)
    with pytest.raises(ValueError, match=r"DiMR: expected conditioning of the whole picture"):
        ksampler(dimr(), (area, negative))
    (masked,) = ConditioningSetMask().append(positive, torch.ones(1, 32, 32), "default", 1.0)
    whole = ksampler(dimr(), (positive, negative))
    assert torch.equal(ksampler(dimr(), (masked, negative)), whole)
    tiled, error = dimr().clone(), comfy.module("infdit_core.errors").InfDiTError
    tiled.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"][..., :16], args["timestep"], **args["c"])
    )
    with pytest.raises(error, match=r"whole picture of 256x256 px; got a part of 128x256 px"):
        ksampler(tiled, (positive, negative))


def test_a_controlnet(dimr, classes):
    ((_, values),), _ = classes(3)
    values = values | {"control": object()}
    conds = dimr().model.extra_conds
    with pytest.raises(ValueError, match=r"DiMR: expected the class alone; got .* control,"):
        conds(**values, cross_attn=torch.ones(1), noise=torch.zeros(1, 4, 32, 32), device="cpu")


def test_the_decay_on_another_model(comfy, load):
    decay = comfy.nodes["DiMRCFGDecay"]
    for model in (load("tiny")[0], base_model("sd15"), "model"):
        with pytest.raises(ValueError, match="DiMR CFG decay: expected a model from DiMR Loader;"):
            decay.execute(model, 3.0, 2.0)


def test_patches_for_unets_name_what_they_got(comfy, dimr):
    message = r": expected a model with the UNet of SDXL, .*; got DiMRModel, whose network is a Di"
    nodes, model = comfy.nodes, dimr()
    with pytest.raises(ValueError, match="HiDiffusion" + message):
        nodes["HiDiffusion"].execute(model, **HIDIFFUSION)
    with pytest.raises(ValueError, match="Upsample Guidance" + message):
        nodes["UpsampleGuidance"].execute(model, **UPSAMPLE_GUIDANCE)


def test_an_unet_is_sampled_as_ever_after_dimr(comfy, dimr, classes):
    before = sample_unet(base_model("sd15"), steps=1)
    ksampler(dimr(), classes(3))
    assert torch.equal(sample_unet(base_model("sd15"), steps=1), before)
