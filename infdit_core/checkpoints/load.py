"""Inf-DiT checkpoints: checked strictly and loaded.

The release's network loads with `strict=False`, and missing weights then give pure noise without
a word. Here every tensor of `release_shapes` must be there with its shape.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ..network.config import InfDiTConfig
from ..network.model import InfDiT
from .checkpoint import MAX_LISTED, Checkpoint, CheckpointError, open_checkpoint, require_tensors
from .foreign import describe_tensors
from .names import is_known_extra, network_state_dict, release_shapes

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parents[2] / "models"
"""Where the small model lies that comes with the pack."""
EXPECTED = (
    "expected an Inf-DiT checkpoint: the release's mp_rank_00_model_states.pt, or a .pt or"
    " .safetensors file made from it"
)


def read_config(checkpoint: Checkpoint) -> InfDiTConfig:
    """The hyper-parameters that the shapes of a checkpoint fix.

    Raises:
        CheckpointError: some other kind of model, or sizes that contradict each other.
    """
    name, shapes = checkpoint.path.name, checkpoint.shapes
    if "mixins.patch_embed.proj.weight" not in shapes:
        raise CheckpointError(f"{name} {describe_tensors(shapes)}; {EXPECTED}")
    try:
        return InfDiTConfig.from_shapes(shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{name} has no tensor {error.args[0]}, which every Inf-DiT checkpoint has; "
            "the file is incomplete"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{name} is not a usable Inf-DiT checkpoint: {error}") from error


def check(checkpoint: Checkpoint, config: InfDiTConfig) -> list[str]:
    """Insist on every tensor of the network; return the keys that nothing is known about.

    Raises:
        CheckpointError: tensors are missing, or have another shape or an integer dtype. Lists them.
    """
    unknown = require_tensors(checkpoint, release_shapes(config), "an Inf-DiT of this size")
    return [key for key in unknown if not is_known_extra(key)]


def read_network(checkpoint: Checkpoint) -> tuple[InfDiTConfig, dict[str, Tensor]]:
    """The hyper-parameters and the state dict of `InfDiT`; tells the log of unknown tensors.

    Raises:
        CheckpointError: not a complete Inf-DiT checkpoint.
    """
    config = read_config(checkpoint)
    if unknown := check(checkpoint, config):
        some = ", ".join(unknown[:MAX_LISTED])
        name = checkpoint.path.name
        logger.warning("%s has %d tensors unknown to Inf-DiT: %s", name, len(unknown), some)
    return config, network_state_dict(checkpoint, config)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> InfDiT:
    """Load a checkpoint for inference.

    On the CPU in the file's own dtype, the weights stay views of the memory-mapped file.

    Raises:
        CheckpointError: not a complete Inf-DiT checkpoint.
    """
    with open_checkpoint(path) as checkpoint:
        config, state = read_network(checkpoint)
        model = InfDiT(config, dtype=dtype, device="meta")
        model.metadata = checkpoint.metadata
        state = {key: tensor.to(device, dtype) for key, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
