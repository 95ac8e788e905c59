"""`infdit generate`, with the tiny network of random weights."""

import importlib
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infdit_core.__main__ import main
from infdit_core.cli.generate import noise
from infdit_core.dimr import vae
from infdit_core.dimr.config import HEADS_KEY
from infdit_core.dimr.load import load_model
from infdit_core.dimr.sampling import LATENT_SCALE, sample
from infdit_core.pictures.files import read_image
from tests.goldens import golden, golden_path

FAST = ["--evaluations", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(golden("dimr/tiny_2r.safetensors"), path, {HEADS_KEY: "4"})
    return path


def vae_tensors(width: int = 32) -> dict[str, torch.Tensor]:
    """A whole decoder of random weights under the names of its authors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, layer in vae._layers(width).items():
        for key, tensor in layer.state_dict().items():
            std = 1.2 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3
            value = std * torch.randn(tensor.shape, generator=generator)
            tensors[f"{name}.{key}"] = value + (
                "norm" in f"{name}.{key}" and key.endswith("weight")
            )
    return tensors


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(vae_tensors(), path)
    return path


def generate(model: Path, *args: object) -> int:
    return main(["generate", "--model", str(model), *FAST, *map(str, args)])


def fails(capsys, *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("infdit: error: "), error
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def latent(path: Path) -> torch.Tensor:
    return load_file(path)["latent_tensor"]


@pytest.mark.comfy
def test_latents_are_comfyuis(comfy, model):
    """The noise is ComfyUI's, the file is read by its node, classes take turns."""
    import comfy.sample
    import folder_paths

    nodes = importlib.import_module("nodes")  # ComfyUI's, where ours has the same name
    drawn = Path(folder_paths.get_input_directory()) / "dimr"
    names = ["207", "black swan"]
    options = ("--count", 3, "--seed", 7, "--cfg", 3, "--cfg-exponent", 2, "-o", drawn)
    assert generate(model, "--class", *names, *options) == 0
    network = load_model(model)
    start = noise(7, 3, network.config)
    empty = torch.zeros(3, 4, 32, 32)
    assert torch.equal(start, comfy.sample.prepare_noise(empty, 7))
    calls = []

    def counted(x, t, classes):
        calls.append(classes.tolist())
        return network(x, t, classes)

    classes = [207, 100, 207]
    expected = sample(counted, start, torch.tensor(classes), evaluations=4, cfg_scale=3, exponent=2)
    # no class with and without guidance in one call; at the noisy end the scale is 1
    assert calls == [classes, *[classes, [1000] * 3] * 3]
    files = sorted(drawn.iterdir())
    assert [f.name for f in files] == [
        "class100_seed7_2.latent",
        "class207_seed7_1.latent",
        "class207_seed7_3.latent",
    ]
    for file, n in zip(files, (1, 0, 2), strict=True):
        assert set(load_file(file)) == {"latent_tensor", "latent_format_version_0"}
        read = nodes.LoadLatent().load(f"dimr/{file.name}")[0]["samples"]
        assert torch.equal(read, expected[n : n + 1] / LATENT_SCALE)
    with safe_open(files[0], "pt") as file:
        about = file.metadata()
    assert about["dimr.class"] == "100 black swan"
    assert about["dimr.picture"] == "2 of 3"
    assert about["dimr.cfg_exponent"] == "2"


def test_pictures_are_the_decoded_latents(model, decoder, tmp_path, monkeypatch, capsys):
    def offline(*args):
        raise AssertionError("expected no network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    one = ("--class", 3, "--seed", 1)
    assert generate(model, *one, "-o", tmp_path / "a.latent") == 0
    assert generate(model, *one, "-o", tmp_path / "a.png", "--vae", decoder) == 0
    assert "a.png: class 3\n" in capsys.readouterr().out
    z = latent(tmp_path / "a.latent") * LATENT_SCALE
    expected = vae.decode(vae.read_decoder(decoder), z)
    picture, info = read_image(tmp_path / "a.png")
    assert expected.std() > 0.1
    torch.testing.assert_close(picture, (expected * 255).round() / 255, atol=1.01 / 255, rtol=0)
    assert info.metadata.text["dimr.seed"] == "1"
    assert Image.open(tmp_path / "a.png").size == (256, 256)


@pytest.mark.comfy
@pytest.mark.slow
def test_the_decoder_is_comfyuis(comfy, tmp_path):
    import comfy.sd

    tensors = vae_tensors(128)  # SD 1.5's shapes
    save_file(tensors, tmp_path / "vae.safetensors")
    z = torch.randn(2, 4, 8, 12)
    expected = comfy.sd.VAE(sd=tensors).decode(z / LATENT_SCALE)
    assert expected.std() > 0.1
    ours = vae.decode(vae.read_decoder(tmp_path / "vae.safetensors"), z)
    assert (ours - expected).abs().max() < 1 / 255


def test_a_decoder_is_read_from_all_kinds_of_files(decoder, tmp_path):
    tensors = vae_tensors()
    whole = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
    whole["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    torch.save({"state_dict": whole}, tmp_path / "whole.ckpt")
    linear = {"to_q", "key", "value", "to_out"}
    renamed = {diffusers_name(key): tensor for key, tensor in tensors.items()}
    for key in renamed:
        if linear & {*key.split(".")} and key.endswith("weight"):
            renamed[key] = renamed[key].flatten(1)
    save_file(renamed, tmp_path / "diffusers.safetensors")
    expected = vae.read_decoder(decoder).state_dict()
    for name in ("whole.ckpt", "diffusers.safetensors"):
        read = vae.read_decoder(tmp_path / name).state_dict()
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def diffusers_name(key: str) -> str:
    for ours, theirs in (
        ("mid.block_1", "mid_block.resnets.0"),
        ("mid.block_2", "mid_block.resnets.1"),
        ("attn_1.norm.", "attn_1.group_norm."),
        ("attn_1.q.", "attn_1.to_q."),
        ("attn_1.k.", "attn_1.key."),
        ("attn_1.v.", "attn_1.value."),
        ("attn_1.proj_out", "attn_1.to_out.0"),
        ("mid.attn_1", "mid_block.attentions.0"),
        *((f"decoder.up.{n}.block.", f"decoder.up_blocks.{3 - n}.resnets.") for n in range(4)),
        *(
            (f"decoder.up.{n}.upsample", f"decoder.up_blocks.{3 - n}.upsamplers.0")
            for n in range(4)
        ),
        ("nin_shortcut", "conv_shortcut"),
        ("norm_out", "conv_norm_out"),
    ):
        key = key.replace(ours, theirs)
    return key


def test_what_is_refused_before_any_work(model, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("infdit_core.cli.generate.load_model", None)  # would be a TypeError
    there = tmp_path / "there.latent"
    there.write_bytes(b"")
    sdxl = vae_tensors() | {"conditioner.embedders.0.x": torch.zeros(1)}
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    part = vae_tensors()
    del part["decoder.up.3.upsample.conv.bias"]
    save_file(part, tmp_path / "part.safetensors")
    inf_dit = golden_path("xs/mp_rank_00_model_states.pt")
    new = ("-o", tmp_path / "new")
    for refused, *parts in (
        (("--class", "terrier dog", *new), "terrier dog"),
        (("--class", "terrier", *new), "179 Staffordshire bullterrier"),
        (("--class", "1001", *new), "0 to 999"),
        (("--class", 1, "-o", there), "already exists", "--overwrite"),
        (("--class", 1, "-o", there, "--count", 2), "one file", "folder for several"),
        (("--class", 1, "-o", there / "below"), "cannot be made"),
        (("--class", 1, "-o", tmp_path / "a.png"), ".latent", "--vae"),
        (("--class", 1, "-o", tmp_path / "a.txt", "--vae", decoder), ".png"),
        (("--class", 1, *new, "--vae", model), "is a DiMR checkpoint", "Stable Diffusion 1.5"),
        (("--class", 1, *new, "--vae", tmp_path / "sdxl.safetensors"), "expected the VAE of"),
        (("--class", 1, *new, "--vae", tmp_path / "part.safetensors"), "up.3.upsample.conv.bias"),
        (("--class", 1, *new, "--model", inf_dit), "is an Inf-DiT", "DiMR-XL_2R_800epochs.pth"),
    ):
        assert generate(model, *refused) == 1
        fails(capsys, *parts)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("infdit_core.memory.host.available_bytes", lambda: 2e6)
    assert generate(model, "--class", 1, *new, "--count", 16) == 1
    fails(capsys, "16 of tiny.safetensors", "of RAM; 2 MB are free", "smaller --count")


def test_interrupted_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("infdit_core.cli.generate.sample", interrupt)
    assert generate(model, "--class", 1, "-o", tmp_path) == 130
    assert capsys.readouterr().err == "infdit: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_convert_then_inspect(model, tmp_path, capsys):
    target = tmp_path / "small.safetensors"
    assert main(["convert", str(model), str(target), "--dtype", "bf16"]) == 0
    assert main(["inspect", str(target)]) == 0
    said = capsys.readouterr().out
    for line in (
        "small.safetensors: 198 tensors, ",
        "small.safetensors: a complete DiMR\n",
        "stage 0: dim 48, hidden_dim 96, blocks 5, side 16, stem 2, final_kernel 3, heads 4",
        "latent: 4×32×32\n",
        "parameters: 273,848\n",
        "dtype: bfloat16 (198 tensors)\n",
        "dimr.source: tiny.safetensors\n",
    ):
        assert line in said
    state = load_model(target).state_dict()
    for name, tensor in load_model(model).state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16().float())
