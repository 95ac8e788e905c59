"""Tensors recorded by running the authors' release with tiny random weights.

`tests/golden` holds all that the tests need, large tensors thinned out to every third or fifth
entry of an axis. A folder of further recordings is named by INFDIT_GOLDEN; its cases are marked
`extra`:

    INFDIT_GOLDEN=FOLDER python3 tools/dev.py test -m "extra and not slow and not gpu"
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infdit_core.checkpoints.checkpoint import open_checkpoint
from infdit_core.checkpoints.load import read_config
from infdit_core.checkpoints.names import network_state_dict, release_shapes
from infdit_core.dimr.load import read_network as read_dimr
from infdit_core.dimr.model import DiMR
from infdit_core.network.condition import Condition
from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [GOLDEN]
if further := os.environ.get("INFDIT_GOLDEN"):
    FOLDERS.append(Path(further).resolve(strict=True))


def golden_path(name: str) -> Path:
    """Where a recorded file lies, such as "xs/a_full_2x3.safetensors"."""
    return next((f / name for f in FOLDERS if (f / name).exists()), GOLDEN / name)


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a recorded file; the copy in the repository may hold a part of them."""
    paths = [folder / name for folder in FOLDERS if (folder / name).exists()]
    if not paths:
        raise FileNotFoundError(f"Expected {name} in one of {FOLDERS}; there is none.")
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def thinned(found: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """Every n-th entry of each axis, as many as were recorded."""
    strides = (-(-a // b) for a, b in zip(found.shape, recorded.shape, strict=True))
    return found[tuple(slice(None, None, stride) for stride in strides)]


def golden_marks(name: str, key: str | None = None) -> list[pytest.MarkDecorator]:
    """Of a case that needs a recorded file, or one tensor of it."""
    path = GOLDEN / name
    ours = path.exists() and (key is None or key in load_file(path))
    return [] if ours else [pytest.mark.extra]


def golden_cases(pattern: str) -> list[Any]:
    """The names of the recorded files that match, for `parametrize`."""
    names = {str(p.relative_to(folder)) for folder in FOLDERS for p in folder.glob(pattern)}
    return [pytest.param(name, id=name, marks=golden_marks(name)) for name in sorted(names)]


def golden_dimr(name: str) -> DiMR:
    """The tiny network of "tiny_2r" or "tiny_3r"."""
    stage = json.loads(golden_path(f"dimr/{name}.json").read_text())["stages"][0]
    with open_checkpoint(golden_path(f"dimr/{name}.safetensors")) as checkpoint:
        config, state = read_dimr(checkpoint, heads=stage["num_attention_heads"])
    model = DiMR(config)
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return model.requires_grad_(False)


def golden_model(name: str, dtype=torch.float32, **config) -> InfDiT:
    """The tiny network of "xs" or "s", with changes to its configuration."""
    with open_checkpoint(golden_path(f"{name}/mp_rank_00_model_states.pt")) as checkpoint:
        found = read_config(checkpoint)
        model = InfDiT(replace(found, **config), device="meta")
        tensors = {k: v.to(dtype) for k, v in network_state_dict(checkpoint, found).items()}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def golden_condition(tensors: dict[str, torch.Tensor]) -> Condition:
    return Condition(tensors["concat_lr_imgs"], tensors["lr_imgs"], tensors["vector"])


def random_condition(model: InfDiT, rows: int, columns: int, batch: int = 1, seed: int = 0):
    """A noisy picture of rows×columns blocks and its condition."""
    generator = torch.Generator().manual_seed(seed)
    h, w = rows * model.config.block_px, columns * model.config.block_px
    cond = Condition(
        torch.rand(batch, 3, h, w, generator=generator) * 2 - 1,
        torch.rand(batch, 3, h // 4, w // 4, generator=generator) * 2 - 1,
        torch.randn(batch, model.config.vector_size, generator=generator),
    )
    return torch.randn(batch, 3, h, w, generator=generator), cond


def fail_at(monkeypatch: pytest.MonkeyPatch, cell: int) -> None:
    """Let the n-th layer call from now on fail for want of memory."""
    calls, layer = itertools.count(1), InfDiT.layer

    def fail(model, *args):
        if next(calls) == cell:
            raise torch.OutOfMemoryError("injected")
        return layer(model, *args)

    monkeypatch.setattr(InfDiT, "layer", fail)


def save_bf16_run(path: Path) -> None:
    """The file that a bf16 run of the release saves: all keys, rotary tables too, in bf16."""
    state = {k: v.bfloat16() for k, v in golden("xs/model.safetensors").items()}
    for name in ("cos", "sin"):
        state[f"mixins.adaln_layer.rope.freqs_{name}"] = torch.zeros(256, 256, 16).bfloat16()
    torch.save({"module": state}, path)


def random_tensors(config: InfDiTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a network under the release's keys that is neither trained nor trivial."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in release_shapes(config).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        one = 1.0 if "norm" in key or "_ln." in key else 0.0
        offset = one if key.endswith("weight") else 0.0
        tensors[key] = offset + scale * torch.randn(shape, generator=generator)
    return tensors


def random_model(config: InfDiTConfig, std: float) -> InfDiT:
    """A network whose weights are all normal, without a meaning."""
    model = InfDiT(config, device="meta").to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=std, generator=generator)
    return model


TINY = InfDiTConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    patch_size=4,
    block_patches=8,
    mlp_size=64,
    vector_size=0,
)
"""A network that runs in milliseconds and needs no CLIP."""
TINY_PRIOR = replace(TINY, prior_width=8, prior_depth=2)
ASKED = {"infdit.preset": '{"solver": "euler", "shares": [1, 0.25], "consistency": 1}'}
"""A network of that size with a prior, and what its file asks of the preset auto."""
