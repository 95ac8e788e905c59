"""Hyper-parameters of an Inf-DiT, read from the tensor shapes of a checkpoint.

The released model never states its configuration; every number here follows from a shape under the
release's key names (Inf-DiT, arXiv 2405.04312), so a model of any size loads without a config file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..edm import RESIDUAL_DATA, RESIDUAL_MAX, SIGMA_DATA, SIGMA_MAX

Shapes = Mapping[str, tuple[int, ...]]

_ADALN = "mixins.adaln_layer."
LR_SCALE = 4
"""The low-resolution picture is the target divided by this."""
_LR_PATCH = 2
"""`proj_lr` makes one token of this many LR pixels in each direction."""
_MAX_LAYERS, _MAX_SIZE = 256, 2**16
"""A file that claims more is damaged or hostile; building such a network would never end."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats of weights and computation, by the names that users choose from."""


@dataclass(frozen=True)
class InfDiTConfig:
    """Everything that fixes the network; `RELEASED` is that of the released model."""

    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """Attention heads; the head size is `hidden_size / num_heads`."""
    patch_size: int
    """Side in pixels of the square that becomes one token."""
    block_patches: int
    """Side in patches of an attention block."""
    mlp_size: int
    """Hidden width of the MLP."""
    vector_size: int = 768
    """Length of the CLIP embedding; 0 for a model without `cond_embed`."""
    time_features: int = 192
    """Sine and cosine features of the noise level."""
    rope_wrap: int = 0
    """Rotary positions are taken modulo this many patches; 0 for true positions.

    The release wraps at 1024 patches (4096 px), which breaks the neighbourhood there. Below that
    size both agree, so true positions are the default.
    """
    prior_width: int = 0
    """Channels of the prior; 0 for a model without one, which diffuses whole pictures."""
    prior_depth: int = 0
    """Residual pairs of convolutions of the prior."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of what is diffused: pictures, or what a prior leaves of them."""
        return RESIDUAL_DATA if self.prior_width else SIGMA_DATA

    @property
    def sigma_max(self) -> float:
        """Noise level at which sampling starts."""
        return RESIDUAL_MAX if self.prior_width else SIGMA_MAX

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def block_px(self) -> int:
        """Side of a block in pixels: picture sides must be multiples of it."""
        return self.block_patches * self.patch_size

    @property
    def block_tokens(self) -> int:
        return self.block_patches**2

    @property
    def lr_block(self) -> int:
        """Side in LR tokens of what one block covers."""
        return self.block_px // (LR_SCALE * _LR_PATCH)

    @property
    def lr_window(self) -> int:
        """Side in LR tokens of the 3×3-block window that one block sees."""
        return 3 * self.lr_block

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> InfDiTConfig:
        """Read the hyper-parameters from the shapes of a state dict with the release's keys.

        Raises:
            KeyError: a tensor that the sizes are read from is missing; the message is its key.
            ValueError: the sizes contradict each other.
        """
        patch = _shape(shapes, "mixins.patch_embed.proj.weight", 4)
        segments = _shape(shapes, _ADALN + "re_pos_embed", 4)
        query_position = _shape(shapes, _ADALN + "lr_query_position_embedding", 4)
        mlp = _shape(shapes, "transformer.layers.0.mlp.dense_h_to_4h.weight", 2)
        time = _shape(shapes, "time_embed.mlp.0.weight", 2)
        vector_key = "cond_embed.map_vector.0.weight"
        prior_key = "prior.head.weight"
        config = cls(
            hidden_size=patch[0],
            num_layers=segments[0],
            num_heads=segments[2],
            patch_size=patch[2],
            block_patches=math.isqrt(query_position[1]),
            mlp_size=mlp[0],
            vector_size=_shape(shapes, vector_key, 2)[1] if vector_key in shapes else 0,
            time_features=time[1],
            prior_width=_shape(shapes, prior_key, 4)[0] if prior_key in shapes else 0,
            prior_depth=sum(key.endswith(".a.weight") for key in shapes if key[:6] == "prior."),
        )
        config.validate()
        return config

    def validate(self) -> None:
        """Raise ValueError where the sizes cannot belong to one network."""
        sizes = (
            self.hidden_size, self.num_heads, self.patch_size, self.block_px, self.mlp_size,
            self.time_features,
        )  # fmt: skip
        if min(*sizes, self.num_layers) < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        layers = max(self.num_layers, self.prior_depth)
        if max(*sizes, self.vector_size, self.prior_width) > _MAX_SIZE or layers > _MAX_LAYERS:
            raise ValueError(
                f"expected at most {_MAX_LAYERS} layers and sizes up to {_MAX_SIZE}, got {self}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads"
            )
        if self.head_dim % 4:
            raise ValueError(f"head size {self.head_dim} is not a multiple of 4 (2-D rotary)")
        if self.block_px % (LR_SCALE * _LR_PATCH):
            raise ValueError(f"block of {self.block_px} px is not a multiple of 8 px")
        if self.time_features % 2:
            raise ValueError(f"{self.time_features} time features: must be even")


RELEASED = InfDiTConfig(
    hidden_size=1280,
    num_layers=28,
    num_heads=16,
    patch_size=4,
    block_patches=32,
    mlp_size=5120,
)


def _shape(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(shapes[key])
    if len(shape) != ndim:
        raise ValueError(f"{key} has shape {shape}, expected {ndim} dimensions")
    return shape
