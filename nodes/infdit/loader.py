"""Loading Inf-DiT models and CLIP towers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import folder_paths
from comfy_api.latest import io

from ...infdit_core.checkpoints.checkpoint import open_checkpoint
from ...infdit_core.checkpoints.load import BUNDLED_FOLDER
from ...infdit_core.checkpoints.names import clip_state_dict
from ...infdit_core.clip import read_clip
from ...infdit_core.network.config import DTYPES
from ..common import CATEGORY, Clip, named_errors, require
from .clip import PatchedClip
from .comfy_model import CLIP_ATTACHMENT, load_patcher

_FOLDER = "infdit"
_EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}
_CLIP_FOLDERS = ("clip_vision", "text_encoders", _FOLDER)
_DTYPES = {"default": None, **DTYPES}
_FP8 = "fp8 layers"

folder_paths.add_model_folder_path(
    _FOLDER, os.path.join(folder_paths.models_dir, _FOLDER), is_default=True
)
folder_paths.add_model_folder_path(_FOLDER, str(BUNDLED_FOLDER))
folder_paths.folder_names_and_paths[_FOLDER][1].update(_EXTENSIONS)


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
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A model file from models/infdit, as .safetensors or the release's"
                    " .pt. The small model that comes with this pack is in the list.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=[*_DTYPES, _FP8],
                    default="default",
                    tooltip="Number format of the weights. Default takes that of the file where"
                    " the device supports it; fp32 is exact and needs twice the memory of bf16;"
                    " fp8 layers halve that of bf16, are fast on NVIDIA GPUs of 2022 and later,"
                    " slow elsewhere, and not exact.",
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
        return model_name in [None, *folder_paths.get_filename_list(_FOLDER)] or (
            "Load Inf-DiT Checkpoint: expected a file in models/infdit or a folder listed under"
            f" infdit in extra_model_paths.yaml; {model_name!r} is not there. The authors' model is"
            " mp_rank_00_model_states.pt, about 2.5 GB, linked in the README of"
            " github.com/THUDM/Inf-DiT: put it into models/infdit as it is. Or choose"
            " infdit_small.safetensors, which comes with this pack."
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> str:
        return _fingerprint([_FOLDER], model_name)

    @classmethod
    @named_errors("Load Inf-DiT Checkpoint")
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        require(model_name, str, "expected model_name from the list")
        path = folder_paths.get_full_path_or_raise(_FOLDER, model_name)
        with open_checkpoint(path) as checkpoint:
            model = load_patcher(checkpoint, _DTYPES.get(weight_dtype), fp8=weight_dtype == _FP8)
            tower = clip_state_dict(checkpoint)
            clip = PatchedClip(tower) if tower is not None else None
        model.set_attachments(CLIP_ATTACHMENT, clip)
        return io.NodeOutput(model, clip)


class InfDiTCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = {
            name for folder in _CLIP_FOLDERS for name in folder_paths.get_filename_list(folder)
        }
        return io.Schema(
            node_id="InfDiTCLIPLoader",
            display_name="Load Inf-DiT CLIP",
            category=CATEGORY,
            description="Loads open_clip ViT-L-14 (datacomp_xl_s13b_b90k), for models that came"
            " without a CLIP tower, and for guidance by text.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=sorted(names),
                    tooltip="A whole open_clip ViT-L-14 file with the datacomp_xl_s13b_b90k"
                    " weights, from models/clip_vision, models/text_encoders or models/infdit."
                    " Other CLIP models give other embeddings and worse pictures.",
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
        return _fingerprint(_CLIP_FOLDERS, clip_name)

    @classmethod
    @named_errors("Load Inf-DiT CLIP")
    def execute(cls, clip_name: str) -> io.NodeOutput:
        require(clip_name, str, "expected clip_name from the list")
        folder = next(
            (f for f in _CLIP_FOLDERS if folder_paths.get_full_path(f, clip_name)), _FOLDER
        )
        path = folder_paths.get_full_path_or_raise(folder, clip_name)
        return io.NodeOutput(PatchedClip(read_clip(path)))


def _fingerprint(folders: Sequence[str], name: str | None) -> str:
    """What changes when the file is replaced, so that a cached model is not taken for the new."""
    paths = (folder_paths.get_full_path(folder, name) for folder in folders if name is not None)
    path = next((path for path in paths if path), None)
    if path is None:
        return ""
    status = os.stat(path)
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
