"""The names of the network's tensors: in the release's files, and in `DiMR`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import DiMRConfig
from .model import parameter_shapes

_TIME_DEPENDENT = ("param0", "param1", "nodecay_weight", "nodecay_bias")
"""Vectors of the release, to the rows of a `TimeDependent`."""
_ROWS = ".rows.weight"

_RELEASE = tuple(
    (re.compile(rf"(?<=\.){ours}(?=\.)"), theirs)
    for ours, theirs in {
        "stem": "input_layer.1",
        "position": "input_layer.3.position_embeddings",
        "class_embed": "class_embeds",
        r"mixer\.qkv": "block1.query_key_value",
        r"mixer\.conv": "block1.1",
        "mixer": "block1",
        r"mlp\.gate": "block2.w0",
        r"mlp\.value": "block2.w1",
        r"mlp\.out": "block2.w2",
        "mlp": "block2",
        "skips": "skip_denses",
        r"enlarge\.norm_in": "upsample.0",
        r"enlarge\.linear": "upsample.1.kernel",
        r"enlarge\.norm_out": "upsample.2",
        r"(?<=stages\.\d\.)norm": "output_layer.0",
        "final": "output_layer.2",
    }.items()
)
"""Modules: ours to the release's name."""

_OPTIONS = (
    (re.compile(r"\.condition_key_value\."), "conditioning by text"),
    (re.compile(r"\.(qk_norm|pos_emb)\."), "rotary positions (Axial_RoPE)"),
    (re.compile(r"\.block\d\.norm\.linear\."), "adaptive RMS norms (ADARMSN)"),
    (re.compile(r"\.block\d\.norm\.(scale|d?scale\.weight)$"), "RMS norms without time (RMSN)"),
    (re.compile(r"\.block\d\.norm\.(weight|bias)\b"), "LayerNorm in the blocks (LN)"),
)
"""Tensors of the authors' options that neither released model uses."""


def foreign_options(shapes: Mapping[str, object]) -> list[str]:
    """The authors' options that a file was made with and this network does not have."""
    return [name for pattern, name in _OPTIONS if any(pattern.search(key) for key in shapes)]


def release_shapes(config: DiMRConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network, under the release's names."""
    shapes = {}
    for name, shape in parameter_shapes(config).items():
        keys = _release_keys(name)
        shapes.update(dict.fromkeys(keys, shape if len(keys) == 1 else shape[1:]))
    return shapes


def network_state_dict(tensors: Mapping[str, Tensor], config: DiMRConfig) -> dict[str, Tensor]:
    """From the release's names to those of `DiMR`."""
    state = {}
    for name in parameter_shapes(config):
        found = [tensors[key] for key in _release_keys(name)]
        state[name] = found[0] if len(found) == 1 else torch.stack(found)
    return state


def release_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `network_state_dict`."""
    state = {}
    for name, tensor in state_dict.items():
        keys = _release_keys(name)
        state.update(zip(keys, [tensor] if len(keys) == 1 else tensor, strict=True))
    return state


def _release_keys(name: str) -> list[str]:
    """The tensors of the release that a parameter of `DiMR` is made of."""
    for ours, theirs in _RELEASE:
        name = ours.sub(theirs, name)
    if name.endswith(_ROWS):
        return [f"{name.removesuffix(_ROWS)}.{part}" for part in _TIME_DEPENDENT]
    return [name]
