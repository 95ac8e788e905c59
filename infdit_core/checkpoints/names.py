"""The names of the network's tensors: in the release's checkpoints, and in `InfDiT`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..network.config import InfDiTConfig
from ..network.shapes import parameter_shapes
from .checkpoint import Checkpoint

CLIP_PREFIX = "image_encoder."
_CLIP_MODEL = CLIP_PREFIX + "model."

_UNUSED = re.compile(
    r"mixins\.adaln_layer\.k_layer_norm\.\d+\.(weight|bias)"  # keys use q_layer_norm
    r"|mixins\.adaln_layer\.rope\.freqs_(cos|sin)"  # derived, 0.7 GB in fp32
    r"|transformer\.position_embeddings\.weight"
)

_ADALN = "mixins.adaln_layer."
_LAYER = "transformer.layers.{n}."
_SEGMENTS = _ADALN + "re_pos_embed"  # (L, 4, A, d) for all layers, here (4, hidden) for each
_MODULATION = _ADALN + "adaLN_modulations.{n}.1.{leaf}"  # one for each layer, here one for all

MODULE_NAMES = {
    "mixins.patch_embed.proj": "patch_embed",
    "time_embed.mlp.0": "time_embed.mlp.0",
    "time_embed.mlp.2": "time_embed.mlp.2",
    "cond_embed.map_vector.0": "vector_embed.mlp.0",
    "cond_embed.map_vector.2": "vector_embed.mlp.2",
    _ADALN + "proj_lr": "lr_embed",
    _LAYER + "attention.query_key_value": "layers.{n}.attention.qkv",
    _LAYER + "attention.dense": "layers.{n}.attention.dense",
    _ADALN + "q_layer_norm.{n}": "layers.{n}.attention.qk_norm",
    _LAYER + "mlp.dense_h_to_4h": "layers.{n}.mlp.fc1",
    _LAYER + "mlp.dense_4h_to_h": "layers.{n}.mlp.fc2",
    _ADALN + "cross_attention.query": "cross_attention.query",
    _ADALN + "cross_attention.key_value": "cross_attention.key_value",
    _ADALN + "cross_attention.dense": "cross_attention.dense",
    _ADALN + "cross_q_ln": "cross_attention.query_norm",
    _ADALN + "cross_k_ln": "cross_attention.key_norm",
    _ADALN + "post_cross_attention_layernorm": "cross_attention.output_norm",
    "mixins.final_layer.adaLN_modulation.1": "final.modulation",
    "mixins.final_layer.linear": "final.linear",
    "prior.head": "prior.head",
    "prior.body.{n}.a": "prior.body.{n}.a",
    "prior.body.{n}.b": "prior.body.{n}.b",
    "prior.tail": "prior.tail",
}
"""Modules: the release's name to ours; `{n}` is the layer."""

_POSITIONS = {
    _ADALN + "lr_query_position_embedding": "cross_attention.query_position.weight",
    _ADALN + "lr_key_position_embedding": "cross_attention.key_position.weight",
}
"""Bare parameters (1, n, A, d) of the release, to our embeddings (n, hidden)."""


def is_known_extra(key: str) -> bool:
    """Whether the release saves this tensor although its network never uses it, or CLIP does."""
    return key.startswith(CLIP_PREFIX) or _UNUSED.fullmatch(key) is not None


def release_shapes(config: InfDiTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the network needs, under the release's names."""
    ours = parameter_shapes(config)
    shapes = {key: ours[name] for key, name in _renames(config).items()}
    heads = config.num_heads, config.head_dim
    for key, name in _POSITIONS.items():
        shapes[key] = (1, ours[name][0], *heads)
    shapes[_SEGMENTS] = (config.num_layers, ours[_segment_name(0)][0], *heads)
    for leaf, keys in _modulation_keys(config).items():
        rows, *columns = ours[f"modulations.{leaf}"]
        shapes.update(dict.fromkeys(keys, (rows // config.num_layers, *columns)))
    return shapes


def network_state_dict(checkpoint: Checkpoint, config: InfDiTConfig) -> dict[str, Tensor]:
    """The tensors of the network under the names of `InfDiT`; reads nothing else of the file."""
    state = {ours: checkpoint.tensor(key) for key, ours in _renames(config).items()}
    for key, ours in _POSITIONS.items():
        state[ours] = checkpoint.tensor(key)[0].flatten(1)
    for n, segments in enumerate(checkpoint.tensor(_SEGMENTS).flatten(2)):
        state[_segment_name(n)] = segments
    for leaf, keys in _modulation_keys(config).items():
        state[f"modulations.{leaf}"] = torch.cat([checkpoint.tensor(key) for key in keys])
    return state


def release_state_dict(state_dict: Mapping[str, Tensor], config: InfDiTConfig) -> dict[str, Tensor]:
    """The inverse of `network_state_dict`: from the names of `InfDiT` to the release's."""
    state = {key: state_dict[ours] for key, ours in _renames(config).items()}
    heads = config.num_heads, config.head_dim
    for key, ours in _POSITIONS.items():
        state[key] = state_dict[ours].unflatten(1, heads)[None]
    segments = [state_dict[_segment_name(n)] for n in range(config.num_layers)]
    state[_SEGMENTS] = torch.stack(segments).unflatten(2, heads)
    for leaf, keys in _modulation_keys(config).items():
        parts = state_dict[f"modulations.{leaf}"].chunk(config.num_layers)
        state.update(zip(keys, parts, strict=True))
    return state


def clip_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The CLIP tower that came with the model, under open_clip's names; None where absent."""
    keys = [key for key in checkpoint.shapes if key.startswith(_CLIP_MODEL)]
    return {key.removeprefix(_CLIP_MODEL): checkpoint.tensor(key) for key in keys} or None


def _renames(config: InfDiTConfig) -> dict[str, str]:
    """The release's key to ours, for every tensor that has one counterpart."""
    release = {
        ours.format(n=n): theirs.format(n=n)
        for theirs, ours in MODULE_NAMES.items()
        for n in range(max(config.num_layers, config.prior_depth))
    }
    renames = {}
    for name in parameter_shapes(config):
        module, _, leaf = name.rpartition(".")
        if module in release:
            renames[f"{release[module]}.{leaf}"] = name
    return renames


def _modulation_keys(config: InfDiTConfig) -> dict[str, list[str]]:
    """The release's weights and biases that make the modulations of all layers."""
    layers = range(config.num_layers)
    return {
        leaf: [_MODULATION.format(n=n, leaf=leaf) for n in layers] for leaf in ("weight", "bias")
    }


def _segment_name(layer: int) -> str:
    return f"layers.{layer}.attention.segment_embed.weight"
