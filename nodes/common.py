"""The pack's own socket types, and what its nodes share in talking to users."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy.conds import CONDConstant
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..infdit_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..infdit_core.checkpoints.load import BUNDLED_FOLDER
from ..infdit_core.errors import InfDiTError

CATEGORY = "image/upscaling/Inf-DiT"

Clip = io.Custom("INFDIT_CLIP")
"""A `clip.PatchedClip`: a CLIP tower under ComfyUI's memory management."""
Guidance = io.Custom("INFDIT_GUIDANCE")
"""(B, vector_size) float32 CLIP embeddings."""
CanvasType = io.Custom("INFDIT_CANVAS")
"""An `infdit_core.Canvas`: where the picture lies on the padded target."""

FOLDER = "infdit"
"""Of ComfyUI's models: checkpoints of this pack's networks."""
_EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}

folder_paths.add_model_folder_path(
    FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True
)
folder_paths.add_model_folder_path(FOLDER, str(BUNDLED_FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].update(_EXTENSIONS)

# What patches of one model tell each other in `transformer_options`
HIDIFFUSION = "hidiffusion"
"""Of HiDiffusion's wrappers, and of its `Changes` of an evaluation."""
RAU_NET_OFF = "hidiffusion_rau_net_off"
"""True where HiDiffusion shall use window attention alone."""
UPSAMPLE_SCALE = "upsample_guidance_scale"
"""By how much a run's second call is smaller; 1: there is none."""
LOW_BRANCH = "upsample_guidance_low"
"""True in that call, which is at the model's native size."""

_T = TypeVar("_T")


@contextmanager
def named_errors(node: str) -> Iterator[None]:
    """Put the display name of a node before an error that the user can mend.

    Also a decorator, for `execute`.
    """
    try:
        yield
    except InfDiTError as error:
        raise ValueError(f"{node}: {error}") from error


def require(value: object, kind: type[_T], message: str) -> _T:
    """The value of an input; InfDiTError with `message`, and what came, unless it is a `kind`.

    Over the API a socket can be given a plain value, which ComfyUI does not check.
    """
    if not isinstance(value, kind):
        raise InfDiTError(f"{message}; got {type(value).__name__}")
    return value


class ForOneModel(CONDConstant):
    """In the `model_conds` of CONDITIONING: its model replaces it, any other stumbles on it.

    Args:
        message: of the InfDiTError.
    """

    def process_cond(self, batch_size, **kwargs):
        raise InfDiTError(self.cond)


@contextmanager
def without_folder(path: str) -> Iterator[None]:
    """Leave the folder of a file out of errors: workflows and screenshots are shared."""
    try:
        yield
    except InfDiTError as error:
        message = str(error)
        if path not in message:
            raise
        raise InfDiTError(message.replace(path, os.path.basename(path))) from error


def find_file(folders: Sequence[str], name: str) -> str | None:
    """Path of the file of this name, in the first of the folders of models that has it."""
    paths = (folder_paths.get_full_path(folder, name) for folder in folders)
    return next((path for path in paths if path), None)


def fingerprint(folders: Sequence[str], name: str | None) -> str:
    """What changes when the file is replaced, so that a cached model is not taken for the new."""
    path = None if name is None else find_file(folders, name)
    if path is None:
        return ""
    status = os.stat(path)
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def files_that_hold(folders: Sequence[str], what: Callable[[Checkpoint], bool]) -> list[str]:
    """Names of the files in these folders of models that `what` is true of."""
    names = {name for folder in folders for name in folder_paths.get_filename_list(folder)}
    return sorted(
        name for name in names if _holds(what, fingerprint(folders, name), find_file(folders, name))
    )


@lru_cache(maxsize=1024)
def _holds(what: Callable[[Checkpoint], bool], version: str, path: str | None) -> bool:
    """Asked once of each file; `version` changes when the file does."""
    if path is None:
        return True
    try:
        with open_checkpoint(path) as checkpoint:
            return what(checkpoint)
    except InfDiTError:
        return False


def in_patcher(
    model: BaseModel, load_device: torch.device, *, disable_dynamic: bool = False
) -> ModelPatcher:
    """A model on its offload device in what ComfyUI manages its weights by.

    Args:
        disable_dynamic: without dynamic VRAM, as ComfyUI asks for where a node needs the weights.
    """
    # looked up at call time: ComfyUI replaces the core's at its start where it has dynamic VRAM
    patchers = comfy.model_patcher
    kind = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    offload_device = comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload_device)


def unet_input() -> io.Model.Input:
    """The MODEL of a node whose `execute` asks `require_unet`."""
    return io.Model.Input(
        "model",
        tooltip="An SDXL, SD 1.5 or SD 2.x model, with or without LoRAs. The model"
        " itself is not changed. Other kinds, such as SD 3 or Flux, give an error.",
    )


def require_unet(model: Any) -> UNetModel:
    """The network of a MODEL of SDXL, SD 1.5 or SD 2.x; InfDiTError for any other."""
    require(model, ModelPatcher, "expected a MODEL")
    network = model.get_model_object("diffusion_model")
    if isinstance(network, UNetModel):
        return network
    raise InfDiTError(
        "expected a model with the UNet of SDXL, SD 1.5 or SD 2.x; got"
        f" {type(model.model).__name__}, whose network is a {type(network).__name__}"
    )


def require_numbers(**values: float) -> None:
    """InfDiTError for NaN and infinity, which pass ComfyUI's check of ranges."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise InfDiTError(f"expected a number for {name}; got {value}")


def step_index(sigma: float, sigmas: Sequence[float]) -> int:
    """The sampling step, from 0, that an evaluation at `sigma` belongs to.

    sigmas: the falling noise levels of the run, one more than steps. A level between two of them
    belongs to the step that starts above it, so samplers that evaluate twice a step stay in it.
    """
    # Samplers that work in log sigma come back to a level with a rounding error.
    started = sum(level >= sigma * (1 - 1e-5) for level in sigmas[:-1])
    return max(started - 1, 0)
