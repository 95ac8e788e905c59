"""A checkpoint with every key and shape of the SDXL base model and random weights, 6.9 GB.

For the test of the whole chain, where what the picture shows does not matter.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

# What supported_models.SDXL leaves open: configs/inference/sd_xl_base.yaml of Stability's release.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "legacy": False,
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
}
_NAMES = {torch.float16: "F16", torch.int64: "I64"}


def checkpoint_tensors() -> dict[str, Tensor]:
    """The tensors by their keys in the release's file, as ComfyUI's CheckpointSave orders them.

    Those that a checkpoint learns are on the meta device; the others (position_ids, logit_scale)
    have their values. Import of ComfyUI's modules must work.
    """
    from comfy import ops, supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.sdxl_clip import SDXLClipModel

    config = supported_models.SDXL(supported_models.SDXL.unet_config | UNET)
    operations = ops.disable_weight_init
    unet = UNetModel(**config.unet_config, device="meta", operations=operations)
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=VAE, embed_dim=4)
    clip = SDXLClipModel(device="meta")
    tensors = {
        **config.process_unet_state_dict_for_saving(unet.state_dict()),
        **config.process_clip_state_dict_for_saving(clip.state_dict()),
        **config.process_vae_state_dict_for_saving(vae.state_dict()),
    }
    return {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}


def write_checkpoint(target: Path, seed: int = 0, device: torch.device | str = "cpu") -> int:
    """Write the checkpoint, one tensor in memory at a time; returns its size in bytes.

    Weights are normal with the variance 1 / inputs, which keeps activations near one through any
    depth; the gains of normalisations are one, biases zero. They are drawn on `device`.
    """
    tensors = checkpoint_tensors()
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    generator = torch.Generator(device).manual_seed(seed)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in tensors.items():
            value = _random(key, tensor, generator) if tensor.is_meta else tensor
            file.write(value.contiguous().numpy().data)
        return file.tell()


def _random(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.dim() == 1:
        return torch.full_like(tensor, float(key.endswith("weight")), device="cpu")
    value = torch.randn(tensor.shape, generator=generator, device=generator.device)
    return value.div_(math.sqrt(tensor[0].numel())).half().cpu()
