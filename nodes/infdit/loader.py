"""Loading Inf-DiT models and CLIP towers."""

from __future__ import annotations

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...infdit_core.checkpoints.checkpoint import open_checkpoint
from ...infdit_core.checkpoints.names import clip_state_dict
from ...infdit_core.clip import holds_clip, read_clip
from ...infdit_core.errors import InfDiTError
from ...infdit_core.network.config import DTYPES
from ..common import (
    CATEGORY,
    FOLDER,
    Clip,
    files_that_hold,
    find_file,
    fingerprint,
    named_errors,
    require,
    without_folder,
)
from .clip import PatchedClip
from .comfy_model import CLIP_ATTACHMENT
from .model_file import load_patcher

_CLIP_FOLDERS = ("clip_vision", "text_encoders", FOLDER)
_DTYPES = {"default": None, **DTYPES}
_FP8 = "fp8 layers"
_NO_CLIP = "no CLIP file found"
"""Shown where there is none: an empty list would read "undefined"."""


class InfDiTCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTCheckpointLoader",
            display_name="Load Inf-DiT Checkpoint",
            category=CATEGORY,
            description="Loads an Inf-DiT upscaling model, and the CLIP tower if the file has one.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A model file from models/infdit, as .safetensors or the release's"
                    " .pt. The small model that comes with this pack is in the list.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=[*_DTYPES, _FP8],
                    default="default",
                    tooltip="Number format of the weights. Default takes that of the file where"
                    " the device supports it; fp32 is exact and needs twice the memory of bf16;"
                    " fp8 layers keeps the weights of the layers in 8 bits: the released model then"
                    " takes two thirds of the memory of bf16, and is not exact.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The upscaling model, for Inf-DiT Upscale or KSampler."),
                Clip.Output(
                    display_name="INFDIT_CLIP",
                    tooltip="The CLIP tower of the file, for Inf-DiT CLIP Guidance.",
                ),
            ],
            search_aliases=["inf-dit", "infdit", "load upscaler", "upscale model"],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        # None: it comes from another node, and is looked up when that has run
        return model_name in [None, *folder_paths.get_filename_list(FOLDER)] or (
            "Load Inf-DiT Checkpoint: expected a file in models/infdit or a folder listed under"
            f" infdit in extra_model_paths.yaml; {model_name!r} is not there. The authors' model is"
            " mp_rank_00_model_states.pt, about 2.5 GB, linked in the README of"
            " github.com/THUDM/Inf-DiT: put it into models/infdit as it is. Or choose"
            " infdit_small.safetensors, which comes with this pack."
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> str:
        return fingerprint([FOLDER], model_name)

    @classmethod
    @named_errors("Load Inf-DiT Checkpoint")
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        require(model_name, str, "expected model_name from the list")
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        model = _load(path, weight_dtype)
        with without_folder(path), open_checkpoint(path) as checkpoint:
            tower = clip_state_dict(checkpoint)
            clip = PatchedClip(tower) if tower is not None else None
        model.set_attachments(CLIP_ATTACHMENT, clip)
        return io.NodeOutput(model, clip)


@named_errors("Load Inf-DiT Checkpoint")
def _load(path: str, weight_dtype: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The model of a file; also what ComfyUI calls where it needs the weights once more."""
    fp8 = weight_dtype == _FP8
    with without_folder(path), open_checkpoint(path) as checkpoint:
        try:
            model = load_patcher(
                checkpoint, _DTYPES.get(weight_dtype), fp8=fp8, disable_dynamic=disable_dynamic
            )
        except (RuntimeError, TypeError) as error:  # of ComfyUI's operations, or the device's
            raise InfDiTError(
                f"expected weights that can be loaded as {weight_dtype} on this device; got"
                f" {type(error).__name__}: {error}. Choose bf16 or fp32."
            ) from error
    model.cached_patcher_init = _load, (path, weight_dtype)
    return model


class InfDiTCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTCLIPLoader",
            display_name="Load Inf-DiT CLIP",
            category=CATEGORY,
            description="Loads open_clip ViT-L-14 (datacomp_xl_s13b_b90k), for models that came"
            " without a CLIP tower, and for guidance by text.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=files_that_hold(_CLIP_FOLDERS, holds_clip) or [_NO_CLIP],
                    tooltip="A whole open_clip ViT-L-14 file with the datacomp_xl_s13b_b90k"
                    " weights, from models/clip_vision, models/text_encoders or models/infdit."
                    " Files without a CLIP under open_clip's names are not in the list. Other CLIP"
                    " models give other embeddings and worse pictures.",
                ),
            ],
            outputs=[
                Clip.Output(
                    display_name="INFDIT_CLIP",
                    tooltip="The image tower, and the text tower where the file has one.",
                ),
            ],
            search_aliases=["inf-dit", "infdit", "clip vision", "datacomp"],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str | None) -> bool | str:
        names = [None, *(n for f in _CLIP_FOLDERS for n in folder_paths.get_filename_list(f))]
        return clip_name in names or (
            "Load Inf-DiT CLIP: expected a file in models/clip_vision, models/text_encoders or"
            f" models/infdit; {clip_name!r} is not there. It is open_clip's ViT-L-14 with the"
            " weights datacomp_xl_s13b_b90k; models with a CLIP tower of their own, as the"
            " released one, need it for text only."
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None) -> str:
        return fingerprint(_CLIP_FOLDERS, clip_name)

    @classmethod
    @named_errors("Load Inf-DiT CLIP")
    def execute(cls, clip_name: str) -> io.NodeOutput:
        require(clip_name, str, "expected clip_name from the list")
        path = find_file(_CLIP_FOLDERS, clip_name)
        if path is None:
            raise InfDiTError(cls.validate_inputs(clip_name))
        with without_folder(path):
            return io.NodeOutput(PatchedClip(read_clip(path)))
