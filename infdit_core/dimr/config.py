"""Hyper-parameters of a DiMR, read from the tensor shapes of a checkpoint.

Everything follows from a shape but the number of heads, which is 16 in both released models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 16
"""Of both released models."""
HEADS_KEY = "dimr.heads"
"""In the metadata of a .safetensors file: heads of the transformer stages, if not `HEADS`."""
CLASSES = 1000
"""Of ImageNet."""
NULL_CLASS = CLASSES
"""Stands for no class: what guidance leads away from."""
_MAX_STAGES, _MAX_BLOCKS, _MAX_SIZE = 8, 256, 2**16
"""A file that claims more is damaged or hostile."""


@dataclass(frozen=True)
class StageConfig:
    """One resolution."""

    dim: int
    """Channels of the tokens or of the map."""
    hidden_dim: int
    """Hidden width of the MLP."""
    blocks: int
    """Odd: as many before the middle block as after it."""
    side: int
    """Of the map that the stage works on, and of its table of positions."""
    stem: int
    """Kernel and stride of the convolution that makes that map of the latent."""
    final_kernel: int
    """Of the convolution that makes the stage's output."""
    heads: int = 0
    """Attention heads; 0 for a stage of ConvNeXt blocks."""
    kernel: int = 0
    """Of a ConvNeXt block's depthwise convolution; 0 for a stage of transformer blocks."""

    @property
    def features(self) -> int:
        """Channels that the next stage gets: of the stem and of every block."""
        return self.dim * (self.blocks + 1)


@dataclass(frozen=True)
class DiMRConfig:
    """Everything that fixes the network; `XL_2R` and `G_2R` are the released ones."""

    stages: tuple[StageConfig, ...]
    """From the coarsest resolution to that of the latent."""
    channels: int = 4
    """Of the latent."""
    embeddings: int = CLASSES + 1
    """Rows of the table of classes, `NULL_CLASS` among them."""

    @property
    def latent_side(self) -> int:
        """Height and width of the latent, the only ones that the tables of positions fit."""
        return self.stages[-1].side * self.stages[-1].stem

    @classmethod
    def from_shapes(cls, shapes: Shapes, heads: int = HEADS) -> DiMRConfig:
        """Read the hyper-parameters from the shapes of a state dict with the release's keys.

        Args:
            heads: of the transformer stages.

        Raises:
            KeyError: a tensor that the sizes are read from is missing; the message is its key.
            ValueError: the sizes contradict each other.
        """
        numbers = {int(n) for n in _numbers(shapes, "stages.")}
        if not numbers or numbers != set(range(len(numbers))) or len(numbers) > _MAX_STAGES:
            raise ValueError(f"expected stages 0, 1, ...; got {sorted(numbers) or 'none'}")
        stages = tuple(_stage(shapes, f"stages.{i}.", heads) for i in range(len(numbers)))
        config = cls(
            stages,
            channels=_shape(shapes, "stages.0.input_layer.1.weight", 4)[1],
            embeddings=_shape(shapes, "stages.0.class_embeds.weight", 2)[0],
        )
        config.validate()
        return config

    def validate(self) -> None:
        """Raise ValueError where the sizes cannot belong to one network."""
        for n, stage in enumerate(self.stages):
            sizes = stage.dim, stage.hidden_dim, stage.side, stage.stem, stage.final_kernel
            if min(*sizes, stage.blocks) < 1 or max(sizes) > _MAX_SIZE:
                raise ValueError(f"stage {n}: expected sizes of 1 to {_MAX_SIZE}, got {stage}")
            if stage.blocks > _MAX_BLOCKS or stage.blocks % 2 == 0:
                raise ValueError(
                    f"stage {n}: expected an odd number of blocks up to {_MAX_BLOCKS},"
                    f" got {stage.blocks}"
                )
            if stage.heads and stage.dim % stage.heads:
                raise ValueError(
                    f"stage {n}: width {stage.dim} is not a multiple of {stage.heads} heads; other"
                    f" files than the released ones say theirs in the metadata {HEADS_KEY!r}"
                )
            if (latent := stage.side * stage.stem) != self.latent_side:
                raise ValueError(
                    f"stage {n} is made for latents of {latent} and the last one for"
                    f" {self.latent_side}: the authors' option image_input_ratio is not supported"
                )
        for coarse, fine in zip(self.stages, self.stages[1:], strict=False):
            if fine.side % coarse.side:
                raise ValueError(f"a map of {fine.side} is no multiple of one of {coarse.side}")
        if not self.stages[0].heads:
            raise ValueError("expected transformer blocks in stage 0, which takes the class")
        if self.embeddings <= NULL_CLASS:
            raise ValueError(
                f"expected {CLASSES} classes and one for none, got {self.embeddings} in all"
            )


def _released(dim: int, blocks: tuple[int, int]) -> DiMRConfig:
    coarse = StageConfig(dim, 2 * dim, blocks[0], 16, 2, 3, heads=HEADS)
    return DiMRConfig((coarse, StageConfig(dim // 2, dim, blocks[1], 32, 1, 3, kernel=7)))


XL_2R = _released(960, (39, 21))
G_2R = _released(1152, (57, 29))


def _stage(shapes: Shapes, prefix: str, heads: int) -> StageConfig:
    stem = _shape(shapes, prefix + "input_layer.1.weight", 4)
    positions = _shape(shapes, prefix + "input_layer.3.position_embeddings.weight", 2)
    depthwise = prefix + "blocks.0.block1.1.weight"
    convolves = depthwise in shapes
    return StageConfig(
        dim=stem[0],
        hidden_dim=_shape(shapes, prefix + "blocks.0.block2.w0.weight", 2)[0],
        blocks=len(_numbers(shapes, prefix + "blocks.")),
        side=math.isqrt(positions[0]),
        stem=stem[2],
        final_kernel=_shape(shapes, prefix + "output_layer.2.weight", 4)[2],
        heads=0 if convolves else heads,
        kernel=_shape(shapes, depthwise, 4)[2] if convolves else 0,
    )


def _numbers(shapes: Shapes, prefix: str) -> set[str]:
    """What stands between `prefix` and the next dot, where it is a number."""
    rests = (key.removeprefix(prefix) for key in shapes if key.startswith(prefix))
    return {n for rest in rests if (n := rest.split(".")[0]).isascii() and n.isdigit()}


def _shape(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(shapes[key])
    if len(shape) != ndim:
        raise ValueError(f"{key} has shape {shape}, expected {ndim} dimensions")
    return shape
