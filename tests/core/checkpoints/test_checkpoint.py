"""Reading checkpoints: what is read and what is refused."""

import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infdit_core.checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from infdit_core.checkpoints.load import check, load_model, read_config
from infdit_core.checkpoints.names import (
    clip_state_dict,
    network_state_dict,
    release_shapes,
    release_state_dict,
)
from infdit_core.checkpoints.pickle_reader import read_index
from infdit_core.network.config import RELEASED, InfDiTConfig
from infdit_core.network.model import InfDiT
from tests.goldens import GOLDEN, TINY, golden_cases, golden_path, save_bf16_run

PT = "mp_rank_00_model_states.pt"
XS = replace(TINY, hidden_size=64, num_layers=4, num_heads=4, mlp_size=256, vector_size=16)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """The tensors of a whole checkpoint."""
    return load_file(GOLDEN / "xs" / "model.safetensors")


def read_all(path: Path) -> tuple[InfDiTConfig, dict[str, torch.Tensor]]:
    with open_checkpoint(path) as checkpoint:
        config = read_config(checkpoint)
        assert check(checkpoint, config) == []
        return config, {key: checkpoint.tensor(key) for key in checkpoint.shapes}


def repack(source: Path, target: Path):
    """Copy a .pt archive entry by entry, so without torch's alignment."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


# What is read


@pytest.mark.parametrize("name", golden_cases(f"*/{PT}"))
def test_pt_equals_torch_load(name):
    path = golden_path(name)
    reference = torch.load(path, weights_only=False)["module"]
    _, tensors = read_all(path)
    assert tensors.keys() == reference.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == reference[key].dtype
        assert torch.equal(tensor, reference[key]), key


def test_pt_equals_safetensors():
    config, from_pt = read_all(GOLDEN / "xs" / PT)
    same_config, from_safetensors = read_all(GOLDEN / "xs" / "model.safetensors")
    assert config == same_config == XS
    assert from_pt.keys() == from_safetensors.keys()
    assert all(torch.equal(from_pt[key], from_safetensors[key]) for key in from_pt)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module", None])
def test_layouts(state, tmp_path, wrap):
    content = state if wrap is None else {wrap: state, "rng": torch.get_rng_state(), "step": 3}
    torch.save(content, tmp_path / "model.ckpt")
    _, tensors = read_all(tmp_path / "model.ckpt")
    assert tensors.keys() == state.keys()


def test_strided_shared_and_misaligned_tensors(tmp_path):
    base = torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)
    state = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1:, ::2, 3],
        "scalar": base[2, 3, 4],
        "none": base[:0],
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "flags": torch.tensor([True, False]),
    }
    torch.save(state, tmp_path / "aligned.pt")
    repack(tmp_path / "aligned.pt", tmp_path / "repacked.pt")
    for name in ("aligned.pt", "repacked.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            for key, tensor in state.items():
                assert torch.equal(checkpoint.tensor(key), tensor.detach()), (name, key)
                assert checkpoint.shapes[key] == tuple(tensor.shape)
                assert checkpoint.dtypes[key] == tensor.dtype


def test_tensors_are_private_views_of_one_map(tmp_path):
    path = tmp_path / PT
    shutil.copy(GOLDEN / "xs" / PT, path)
    before, index = path.read_bytes(), read_index(path)
    first, second = "mixins.patch_embed.proj.weight", "mixins.final_layer.linear.weight"
    with open_checkpoint(path) as checkpoint:
        a, b = checkpoint.tensor(first), checkpoint.tensor(second)
    assert a.data_ptr() - b.data_ptr() == index[first].start - index[second].start
    a.zero_()
    assert path.read_bytes() == before
    with pytest.raises(RuntimeError, match="closed"):
        checkpoint.tensor(first)


def test_only_needed_tensors_are_read(monkeypatch, tmp_path):
    save_bf16_run(tmp_path / PT)
    read = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint, "tensor", lambda self, key: read.append(key) or tensor(self, key)
    )
    load_model(tmp_path / PT)
    assert sorted(read) == sorted(release_shapes(XS))


def test_load_model():
    model = load_model(GOLDEN / "xs" / PT)
    same = load_model(GOLDEN / "xs" / "model.safetensors")
    assert model.config == XS
    assert not model.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    half = load_model(GOLDEN / "xs" / PT, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for key, value in model.state_dict().items():
        assert torch.equal(half.state_dict()[key], value.bfloat16()), key


def test_unknown_keys_are_returned_and_logged(state, tmp_path, caplog):
    state["ema.decay"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert check(checkpoint, read_config(checkpoint)) == ["ema.decay"]
    load_model(tmp_path / "model.safetensors")
    assert "ema.decay" in caplog.text


def test_clip_state_dict(state, tmp_path):
    with open_checkpoint(GOLDEN / "xs" / PT) as checkpoint:
        assert clip_state_dict(checkpoint) is None
    state["image_encoder.model.visual.proj"] = torch.ones(4, 2)
    torch.save({"module": state}, tmp_path / PT)
    with open_checkpoint(tmp_path / PT) as checkpoint:
        assert check(checkpoint, read_config(checkpoint)) == []
        clip = clip_state_dict(checkpoint)
    assert list(clip) == ["visual.proj"]
    assert torch.equal(clip["visual.proj"], torch.ones(4, 2))


# The released model


def released_shapes() -> dict[str, tuple[int, ...]]:
    rows = (GOLDEN / "keys_full.tsv").read_text().splitlines()[1:]
    pairs = (row.split("\t") for row in rows)
    return {key: tuple(map(int, re.findall(r"\d+", shape))) for key, shape in pairs}


def test_released_key_set():
    shapes = released_shapes()
    assert len(shapes) == 726
    checkpoint = Checkpoint(
        Path("released.pt"),
        shapes,
        dict.fromkeys(shapes, torch.bfloat16),
        lambda key: torch.empty(shapes[key], device="meta"),
    )
    config = read_config(checkpoint)
    assert config == RELEASED
    assert check(checkpoint, config) == []

    unused = re.compile(r"image_encoder\.|.*\.k_layer_norm\.|.*\.rope\.|.*position_embeddings\.")
    needed = {key: shape for key, shape in shapes.items() if not unused.match(key)}
    saved = release_state_dict(InfDiT(config, device="meta").state_dict(), config)
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == needed
    loaded = network_state_dict(checkpoint, config)
    network = InfDiT(config, device="meta").state_dict()
    assert {key: t.shape for key, t in loaded.items()} == {
        key: t.shape for key, t in network.items()
    }


@pytest.mark.parametrize("vector_size", [16, 0])
def test_names_map_back_and_forth(vector_size):
    config = replace(XS, vector_size=vector_size)
    state = {key: torch.randn(shape) for key, shape in release_shapes(config).items()}
    checkpoint = Checkpoint(
        Path("x"), release_shapes(config), dict.fromkeys(state, torch.float32), state.__getitem__
    )
    assert read_config(checkpoint) == config
    ours = network_state_dict(checkpoint, config)
    InfDiT(config).load_state_dict(ours, strict=True)
    back = release_state_dict(ours, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_two_of_the_names():
    with open_checkpoint(GOLDEN / "xs" / PT) as checkpoint:
        state = network_state_dict(checkpoint, XS)
        key = "mixins.adaln_layer.q_layer_norm.2.weight"
        assert torch.equal(state["layers.2.attention.qk_norm.weight"], checkpoint.tensor(key))
        segments = checkpoint.tensor("mixins.adaln_layer.re_pos_embed")
        assert torch.equal(state["layers.3.attention.segment_embed.weight"], segments[3].flatten(1))


# What is refused


def _write(data: bytes):
    return lambda path: path.write_bytes(data)


def _truncated(name: str, size: int):
    return lambda path: path.write_bytes((GOLDEN / "xs" / name).read_bytes()[:size])


def _tensors(*keys: str, save=torch.save):
    return lambda path: save({key: torch.zeros(2, 2) for key in keys}, path)


def _legacy(path: Path):
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)


def _zip(**entries: bytes):
    def write(path: Path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr("x/" + name.replace("_", "."), data)

    return write


BAD_FILES = {
    "missing": ("a.pt", lambda path: None, "does not exist; expected a .safetensors"),
    "folder": ("a.pt", Path.mkdir, "cannot be read"),
    "empty": ("a.pt", _write(b""), r"is empty \(0 bytes\); expected a \.safetensors"),
    "empty safetensors": ("a.safetensors", _write(b""), "is empty"),
    "text": ("a.pt", _write("né à Zürich\n".encode() * 99), "is a text file that begins with 'né"),
    "web page": ("a.safetensors", _write(b"<!DOCTYPE html>\n"), "text file .* '<!DOCTYPE html>'"),
    "bytes": ("a.pt", _write(bytes(range(128, 256))), "no known format .*80 81 82.*; expected"),
    "pickle": ("a.pt", _write(pickle.dumps({"module": 1})), "no known format"),
    "legacy": ("a.pt", _legacy, "PyTorch before 1.6; load it and save it again"),
    "truncated": ("a.pt", _truncated(PT, 700_000), "truncated or damaged .*expected a whole"),
    "truncated early": ("a.pt", _truncated(PT, 20), "truncated or damaged"),
    "no pickle": ("a.pt", _zip(a_txt=b"1"), "1 entries .*0 entries named data.pkl"),
    "bad pickle": ("a.pt", _zip(data_pkl=b"\x80\x02q"), "its pickle cannot be read"),
    "no dictionary": ("a.pt", _zip(data_pkl=pickle.dumps([1])), "holds no dictionary"),
    "TorchScript": ("a.pt", _zip(data_pkl=b"N.", constants_pkl=b"N."), "TorchScript"),
    "big-endian": ("a.pt", _zip(data_pkl=b"N.", byteorder=b"big"), "big-endian"),
    "truncated safetensors": (
        "a.safetensors",
        _truncated("model.safetensors", 700_000),
        "700000 bytes .*expected a whole",
    ),
    "garbage safetensors": ("a.safetensors", _write(b"\xff\x00" * 100), "safetensors header"),
    "LoRA": ("a.pt", _tensors("unet.down.lora_up.weight"), "is a LoRA.*expected an Inf-DiT"),
    "LoRA safetensors": (
        "a.safetensors",
        _tensors("lora_unet_mid.lora_down.weight", save=save_file),
        "is a LoRA",
    ),
    "SDXL": (
        "a.safetensors",
        _tensors("model.diffusion_model.out.2.weight", "first_stage_model.x", save=save_file),
        "is a Stable Diffusion checkpoint .*expected an Inf-DiT",
    ),
    "open_clip": ("a.bin", _tensors("visual.proj", "logit_scale"), "is a CLIP model"),
    "other": ("a.pt", _tensors("body.0.weight"), r"holds 1 tensors \(body.0.weight\)"),
    "no tensors": ("a.pt", _tensors(), r"holds 0 tensors \(none\)"),
    "incomplete": (
        "a.pt",
        _tensors("mixins.patch_embed.proj.weight"),
        "not a usable .*shape \\(2, 2\\), expected 4 dimensions",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, kind):
    name, write, message = BAD_FILES[kind]
    write(tmp_path / name)
    with (
        pytest.raises(CheckpointError, match=message) as caught,
        open_checkpoint(tmp_path / name) as checkpoint,
    ):
        read_config(checkpoint)
    assert name in str(caught.value)


def test_missing_and_wrong_tensors_are_listed(state, tmp_path):
    del state["time_embed.mlp.2.bias"]
    state["mixins.final_layer.linear.bias"] = torch.zeros(49)
    state["transformer.layers.1.attention.dense.bias"] = torch.zeros(64, dtype=torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "model.safetensors")
    assert str(caught.value).splitlines() == [
        "model.safetensors: 3 of the 79 tensors of an Inf-DiT of this size are missing or wrong:",
        "  time_embed.mlp.2.bias: missing, expected shape (64,)",
        "  transformer.layers.1.attention.dense.bias: dtype torch.int8, expected floating point",
        "  mixins.final_layer.linear.bias: shape (49,), expected (48,)",
    ]


def test_long_lists_are_cut(state, tmp_path):
    sized = ("patch_embed", "position_embedding", "re_pos_embed", ".0.")
    kept = {key: tensor for key, tensor in state.items() if any(part in key for part in sized)}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)(\n  \S+: missing[^\n]*){20}\n  \.\.\. and \d+ more$"
    ):
        load_model(tmp_path / "model.safetensors")


def test_missing_size_tensor(state, tmp_path):
    del state["mixins.adaln_layer.re_pos_embed"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor mixins\.adaln_layer\.re_pos_embed"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("mixins.adaln_layer.re_pos_embed", (10**9, 4, 4, 0)),
        ("mixins.patch_embed.proj.weight", (2**40, 6, 4, 0)),
        ("transformer.layers.0.mlp.dense_h_to_4h.weight", (2**62, 0)),
        ("mixins.adaln_layer.lr_query_position_embedding", (1, 2**60, 4, 0)),
        ("cond_embed.map_vector.0.weight", (0, 2**62)),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(key, shape):
    shapes = {**release_shapes(XS), key: shape}
    checkpoint = Checkpoint(Path("x"), shapes, dict.fromkeys(shapes, torch.float32), torch.empty)
    with pytest.raises(CheckpointError, match="at most 256 layers and sizes up to 65536"):
        read_config(checkpoint)
