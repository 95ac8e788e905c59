"""Loading DiMR models."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io

from ...infdit_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...infdit_core.dimr.load import holds_dimr, read_network
from ..common import (
    FOLDER,
    files_that_hold,
    fingerprint,
    in_patcher,
    named_errors,
    require,
    without_folder,
)
from .comfy_model import DiMRModel, DiMRModelConfig

CATEGORY = "model/DiMR"
_NAME = "DiMR Loader"
_DTYPES = {"default": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NONE = "no DiMR file found"
"""Shown where there is none: an empty list would read "undefined"."""


class DiMRLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiMRLoader",
            display_name=_NAME,
            category=CATEGORY,
            description="Loads a DiMR model, which draws pictures of 256×256 of the 1000 classes of"
            " ImageNet. The authors' weights are for research and do not come with this pack.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files_that_hold([FOLDER], holds_dimr) or [_NONE],
                    tooltip="The authors' DiMR-XL_2R_800epochs.pth or DiMR-G_2R_800epochs.pth, or a"
                    " .safetensors file made from one, in models/infdit. Other files are not in the"
                    " list.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_DTYPES),
                    default="default",
                    tooltip="Number format of the weights. Default takes what suits the file and"
                    " the device; fp32 is exact and needs twice the memory of fp16 and bf16. Norms"
                    " and attention are computed in fp32 with each of them.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for SamplerCustom or KSampler."),
            ],
            search_aliases=["dimr", "imagenet", "class-conditional", "load model"],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        # None: it comes from another node, and is looked up when that has run
        return model_name in [None, *folder_paths.get_filename_list(FOLDER)] or (
            f"{_NAME}: expected a file in models/infdit or a folder listed under infdit in"
            f" extra_model_paths.yaml; {model_name!r} is not there. The authors' research models,"
            " DiMR-XL_2R_800epochs.pth and DiMR-G_2R_800epochs.pth, are at huggingface.co/QHL067/"
            "DiMR: put one into models/infdit as it is."
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> str:
        return fingerprint([FOLDER], model_name)

    @classmethod
    @named_errors(_NAME)
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        require(model_name, str, "expected model_name from the list")
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        return io.NodeOutput(_load(path, weight_dtype))


@named_errors(_NAME)
def _load(path: str, weight_dtype: str, disable_dynamic: bool = False):
    """The model of a file; also what ComfyUI calls where it needs the weights once more."""
    with without_folder(path), open_checkpoint(path) as checkpoint:
        model = load_patcher(checkpoint, _DTYPES[weight_dtype], disable_dynamic=disable_dynamic)
    model.cached_patcher_init = _load, (path, weight_dtype)
    return model


def load_patcher(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, disable_dynamic: bool = False
):
    """Build the model of a checkpoint in a `ModelPatcher`.

    Args:
        checkpoint: an opened file.
        dtype: of the weights; None lets ComfyUI choose from the file's dtype and the device.
        disable_dynamic: without dynamic VRAM, as ComfyUI asks for where a node needs the weights.

    Raises:
        CheckpointError: the file is not a DiMR; the message says why.
    """
    management = comfy.model_management
    config, state_dict = read_network(checkpoint)
    load_device = management.get_torch_device()
    supported = DiMRModelConfig.supported_inference_dtypes
    weight_dtype = dtype or management.unet_dtype(
        device=load_device,
        model_params=sum(t.numel() for t in state_dict.values()),
        supported_dtypes=supported,
        weight_dtype=state_dict["stages.0.stem.weight"].dtype,
    )
    model_config = DiMRModelConfig({"config": config})
    model_config.set_inference_dtype(
        weight_dtype, management.unet_manual_cast(weight_dtype, load_device, supported)
    )
    model = DiMRModel(model_config, device=management.unet_offload_device())
    patcher = in_patcher(model, load_device, disable_dynamic=disable_dynamic)
    model.load_model_weights({f"net.{key}": tensor for key, tensor in state_dict.items()})
    return patcher
