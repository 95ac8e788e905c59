"""Reading DiMR's files: what is read and what is refused."""

import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from infdit_core import CheckpointError
from infdit_core import load_model as load_infdit
from infdit_core.dimr.load import load_model
from infdit_core.dimr.names import release_state_dict
from tests.goldens import golden_dimr, golden_path

SAFETENSORS = golden_path("dimr/tiny_2r.safetensors")
BLOCK = "stages.0.blocks.0.block1."


@pytest.fixture
def saved(tmp_path):
    """A function that writes the tiny file with changes; None leaves a tensor out."""

    def save(metadata=None, **changes):
        state = load_file(SAFETENSORS) | {k.replace("/", "."): v for k, v in changes.items()}
        path = tmp_path / "model.safetensors"
        save_file({k: v for k, v in state.items() if v is not None}, path, metadata)
        return path

    return save


def test_pth_and_safetensors_are_alike(saved, tmp_path):
    pth = tmp_path / "released.pth"
    torch.save(OrderedDict(load_file(SAFETENSORS)), pth)
    expected = golden_dimr("tiny_2r").state_dict()
    for model in (load_model(pth, heads=4), load_model(saved({"dimr.heads": "4"}))):
        assert model.config.stages[0].heads == 4
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name])
    assert load_model(pth).config.stages[0].heads == 16  # of both released models
    half = load_model(SAFETENSORS, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_way_back_to_the_names_of_the_release():
    stored = load_file(SAFETENSORS)
    back = release_state_dict(golden_dimr("tiny_2r").state_dict())
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], stored[key].float()) for key in stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BLOCK + "dense/bias": None}, f"{BLOCK}dense.bias: missing, expected shape (48,)"),
        ({BLOCK + "dense/bias": torch.zeros(47)}, "shape (47,), expected (48,)"),
        ({BLOCK + "dense/bias": torch.zeros(48).int()}, "dtype torch.int32, expected floating"),
        ({"stages/1/gain": torch.zeros(1)}, "1 tensors that no DiMR of this size has: stages.1.ga"),
        ({BLOCK + "condition_key_value/weight": torch.zeros(1)}, "conditioning by text"),
        ({BLOCK + "qk_norm/scale": torch.zeros(1)}, "rotary positions (Axial_RoPE)"),
        ({BLOCK + "norm/linear/weight": torch.zeros(1)}, "adaptive RMS norms (ADARMSN)"),
        ({BLOCK + "norm/scale": torch.zeros(1)}, "RMS norms without time (RMSN)"),
        ({BLOCK + "norm/weight/param0": torch.zeros(1)}, "LayerNorm in the blocks (LN)"),
        ({"stages/1/output_layer/2/weight": None}, "no tensor stages.1.output_layer.2.weight"),
        ({"stages/0/input_layer/1/weight": None}, "expected a DiMR checkpoint"),
    ],
)
def test_what_is_refused_is_named(saved, changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(saved(**changes))


def test_heads_that_are_no_number(saved):
    with pytest.raises(CheckpointError, match=r"expected a number as 'dimr\.heads', got 'many'"):
        load_model(saved({"dimr.heads": "many"}))


def test_each_network_knows_the_other(tmp_path):
    with pytest.raises(CheckpointError, match="is an Inf-DiT checkpoint; expected a DiMR"):
        load_model(golden_path("xs/model.safetensors"))
    with pytest.raises(CheckpointError, match="is a DiMR checkpoint; expected an Inf-DiT"):
        load_infdit(SAFETENSORS)
