"""DiMR checkpoints: checked strictly and loaded."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import (
    MAX_LISTED,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    require_tensors,
)
from ..checkpoints.foreign import describe_tensors
from .config import HEADS, HEADS_KEY, DiMRConfig
from .model import DiMR
from .names import foreign_options, network_state_dict, release_shapes

EXPECTED = (
    "expected a DiMR checkpoint: DiMR-XL_2R_800epochs.pth or DiMR-G_2R_800epochs.pth of the"
    " authors, or a file made from one"
)
_MARK = "stages.0.input_layer.1.weight"


def holds_dimr(checkpoint: Checkpoint) -> bool:
    """Whether it is one to look at, complete or not."""
    return _MARK in checkpoint.shapes


def read_config(checkpoint: Checkpoint, heads: int | None = None) -> DiMRConfig:
    """The hyper-parameters of a checkpoint, from its shapes.

    Args:
        heads: which no shape tells; None for what the metadata say, or else 16.

    Raises:
        CheckpointError: some other kind of model, other options of the authors' code, or sizes
            that contradict each other.
    """
    name, shapes = checkpoint.path.name, checkpoint.shapes
    if not holds_dimr(checkpoint):
        raise CheckpointError(f"{name} {describe_tensors(shapes)}; {EXPECTED}")
    if options := foreign_options(shapes):
        raise CheckpointError(
            f"{name} was made with {', '.join(options)}, options of the authors' code that neither"
            f" released model uses and that are not supported; {EXPECTED}"
        )
    said = checkpoint.metadata.get(HEADS_KEY, str(HEADS)) if heads is None else str(heads)
    if not re.fullmatch(r"[1-9][0-9]{0,3}", said):
        raise CheckpointError(f"{name}: expected a number as {HEADS_KEY!r}, got {said[:80]!r}")
    try:
        return DiMRConfig.from_shapes(shapes, int(said))
    except KeyError as error:
        raise CheckpointError(
            f"{name} has no tensor {error.args[0]}, which every DiMR checkpoint has; the file is"
            " incomplete"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{name} is not a usable DiMR checkpoint: {error}") from error


def read_network(
    checkpoint: Checkpoint, heads: int | None = None
) -> tuple[DiMRConfig, dict[str, Tensor]]:
    """The hyper-parameters and the state dict of `DiMR`; see `read_config`.

    Raises:
        CheckpointError: not exactly the tensors of a DiMR.
    """
    config = read_config(checkpoint, heads)
    needed = release_shapes(config)
    if unknown := require_tensors(checkpoint, needed, "a DiMR of this size"):
        some = ", ".join(unknown[:MAX_LISTED])
        raise CheckpointError(
            f"{checkpoint.path.name} has {len(unknown)} tensors that no DiMR of this size has:"
            f" {some}"
        )
    return config, network_state_dict({key: checkpoint.tensor(key) for key in needed}, config)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    heads: int | None = None,
) -> DiMR:
    """Load a checkpoint for inference; see `read_config`.

    Raises:
        CheckpointError: not a complete DiMR checkpoint.
    """
    with open_checkpoint(path) as checkpoint:
        config, state = read_network(checkpoint, heads)
        model = DiMR(config, dtype=dtype, device="meta")
        state = {key: tensor.to(device, dtype) for key, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
