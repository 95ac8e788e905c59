"""A checkpoint in a core MODEL."""

from __future__ import annotations

import json
import re

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ...infdit_core.checkpoints.checkpoint import Checkpoint
from ...infdit_core.checkpoints.load import read_network
from ..common import in_patcher
from .comfy_model import InfDiTModel, InfDiTModelConfig
from .several_gpus import strips_for_clones

_FP8 = torch.float8_e4m3fn
_FP8_WEIGHT = re.compile(r"layers\.\d+\.(attention\.(qkv|dense)|mlp\.fc[12])\.weight")
"""The weights of the transformer layers, which are nearly all of the network."""


def load_patcher(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    *,
    fp8: bool = False,
    disable_dynamic: bool = False,
):
    """Build the model of a checkpoint in a `ModelPatcher`.

    Args:
        checkpoint: an opened file.
        dtype: of the weights; None lets ComfyUI choose from the file's dtype and the device.
        fp8: 8-bit linear layers inside the transformer layers, by ComfyUI's quantised operations.
        disable_dynamic: without dynamic VRAM, as ComfyUI asks for where a node needs the weights.

    Raises:
        CheckpointError: the file is not an Inf-DiT model; the message says why.
    """
    config, state_dict = read_network(checkpoint)
    load_device = comfy.model_management.get_torch_device()
    supported = InfDiTModelConfig.supported_inference_dtypes
    weight_dtype = dtype or comfy.model_management.unet_dtype(
        device=load_device,
        model_params=sum(t.numel() for t in state_dict.values()),
        supported_dtypes=supported,
        weight_dtype=state_dict["final.linear.weight"].dtype,
    )
    if fp8 and weight_dtype.itemsize == 1:  # --fp8_e4m3fn-unet: the other weights have no scales
        cast = comfy.model_management.unet_manual_cast(weight_dtype, load_device, supported)
        weight_dtype = cast or torch.float32
    model_config = InfDiTModelConfig({"config": config})
    model_config.sampling_settings = InfDiTModelConfig.sampling_settings | {
        "sigma_max": config.sigma_max,
        "sigma_data": config.sigma_data,
    }
    if fp8:
        model_config.quant_config = {"mixed_ops": True}  # as core sets it for quantised files
        state_dict |= _quantized({k: v for k, v in state_dict.items() if _FP8_WEIGHT.fullmatch(k)})
    model_config.set_inference_dtype(
        weight_dtype,
        comfy.model_management.unet_manual_cast(
            None if fp8 else weight_dtype, load_device, supported
        ),
    )
    model = InfDiTModel(model_config, device=comfy.model_management.unet_offload_device())
    patcher = in_patcher(model, load_device, disable_dynamic=disable_dynamic)
    patcher.add_wrapper(WrappersMP.CALC_COND_BATCH, strips_for_clones)
    model.load_model_weights({f"net.{k}": v for k, v in state_dict.items()})
    model.infdit.metadata = checkpoint.metadata
    return patcher


def _quantized(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights (n, m) in 8 bits with what core's own format says of them."""
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    state_dict = {}
    for key, weight in weights.items():
        scale = weight.float().abs().amax().clamp(min=1e-12) / torch.finfo(_FP8).max
        prefix = key.removesuffix("weight")
        state_dict[key] = (weight.float() / scale).to(_FP8)
        state_dict[f"{prefix}weight_scale"] = scale
        state_dict[f"{prefix}comfy_quant"] = note
    return state_dict
