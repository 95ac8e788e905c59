"""Conversion: the same weights under the same names, whole or not at all."""

import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from infdit_core.checkpoints import convert as convert_module
from infdit_core.checkpoints.checkpoint import CheckpointError, open_checkpoint
from infdit_core.checkpoints.convert import convert
from infdit_core.checkpoints.load import load_model
from tests.goldens import GOLDEN, save_bf16_run

PT = "mp_rank_00_model_states.pt"
CLIP_KEY = "image_encoder.model.visual.proj"


@pytest.fixture
def source(tmp_path) -> Path:
    """The golden model with a tensor of CLIP, in a folder of its own."""
    state = load_file(GOLDEN / "xs" / "model.safetensors")
    state[CLIP_KEY] = torch.randn(4, 3).t()
    state["image_encoder.model.steps"] = torch.tensor(5)
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / PT
    torch.save({"module": state, "global_steps": 7}, path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keys_and_report(source, folder, dtype):
    report = convert(source, folder / "model.safetensors", dtype)
    state = torch.load(source, weights_only=True)["module"]
    written = load_file(folder / "model.safetensors")

    unused = {key for key in state if "k_layer_norm" in key or "position_embeddings" in key}
    assert written.keys() == state.keys() - unused
    assert set(report.dropped) == unused
    assert report.unknown == []
    assert report.tensors == len(written)
    assert report.size == (folder / "model.safetensors").stat().st_size
    for key, tensor in written.items():
        expected = state[key].to(dtype) if state[key].is_floating_point() else state[key]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), key


def test_rotary_tables_are_dropped(folder):
    save_bf16_run(folder / PT)
    convert(folder / PT, folder / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert not [key for key in written if "rope" in key]


def test_unknown_keys_are_dropped_and_reported(source, folder):
    state = torch.load(source, weights_only=True)["module"]
    torch.save({**state, "ema.decay": torch.zeros(1)}, source)
    report = convert(source, folder / "model.safetensors")
    assert report.unknown == ["ema.decay"]
    assert "ema.decay" in report.dropped
    assert "ema.decay" not in load_file(folder / "model.safetensors")


def test_metadata(source, folder):
    report = convert(source, folder / "model.safetensors", torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert report.source_sha256 == sha256
    assert json.loads(metadata.pop("infdit.config")) == asdict(report.config)
    assert metadata == {
        "format": "pt",
        "infdit.format_version": "1",
        "infdit.dtype": "bfloat16, int64",
        "infdit.source": PT,
        "infdit.source_sha256": sha256,
    }
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        assert checkpoint.metadata["infdit.source_sha256"] == sha256


def test_converted_model_loads_and_converts_again(source, folder):
    convert(source, folder / "a.safetensors")
    convert(folder / "a.safetensors", folder / "b.safetensors")
    models = [
        load_model(path) for path in (source, folder / "a.safetensors", folder / "b.safetensors")
    ]
    for one in models[1:]:
        pairs = zip(models[0].parameters(), one.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_existing_target(source, folder):
    target = folder / "model.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="already exists; expected a new name or overwrite"):
        convert(source, target)
    assert target.read_bytes() == b"precious"
    convert(source, target, overwrite=True)
    assert CLIP_KEY in load_file(target)


def test_bad_targets(source, folder):
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        convert(source, folder / "model.pt")
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert(source, folder / "absent" / "model.safetensors")
    (folder / "directory.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        convert(source, folder / "directory.safetensors", overwrite=True)
    shutil.copy(GOLDEN / "xs" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(folder / "model.safetensors", folder / "model.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        convert(source, folder / "new.safetensors", torch.int8)


def test_full_disk(source, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**30, 2**30, 2**20)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 1\.3 MiB of disk space; 1\.0 MiB are free"):
        convert(source, folder / "model.safetensors")
    assert os.listdir(folder) == []
    convert(source, folder / "model.safetensors", torch.bfloat16)  # half the size fits


def test_overflow_in_half_precision(source, folder):
    state = torch.load(source, weights_only=True)["module"]
    state["time_embed.mlp.0.bias"][3] = 7e4
    torch.save({"module": state}, source)
    with pytest.raises(CheckpointError, match=r"time_embed\.mlp\.0\.bias has values up to 7e\+04"):
        convert(source, folder / "model.safetensors", torch.float16)
    assert os.listdir(folder) == []


def test_bad_source_leaves_nothing(folder, tmp_path):
    (tmp_path / "model.pt").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"model\.pt is a text file"):
        convert(tmp_path / "model.pt", folder / "model.safetensors")
    assert os.listdir(folder) == []
