"""Files that the templates need and the pack does not bring, small ones in their place."""

import torch
from PIL import Image
from safetensors.torch import save_file

from tools.browser import UPSCALER
from tools.comfy_server import ComfyServer

PICTURE = "square.png"
"""In ComfyUI's input: what SDXL or Inf-DiT might have made."""


def put_files(server: ComfyServer) -> None:
    """A picture into the input folder, and another upscaler into the models."""
    Image.new("RGB", (1024, 1024), "teal").save(server.input_dir / PICTURE)
    save_file(esrgan(), server.models_dir / "upscale_models" / UPSCALER)


def esrgan(width: int = 4, growth: int = 32) -> dict[str, torch.Tensor]:
    """Weights of a tiny ESRGAN that enlarges by 4."""
    shapes = {"conv_first": (3, width), "conv_last": (width, 3)}
    shapes |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (width, width))
    for dense in (1, 2, 3):
        for conv in (1, 2, 3, 4, 5):
            out = width if conv == 5 else growth
            shapes[f"body.0.rdb{dense}.conv{conv}"] = (width + (conv - 1) * growth, out)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, (inner, outer) in shapes.items():
        weights[f"{name}.weight"] = torch.randn(outer, inner, 3, 3, generator=generator) * 0.1
        weights[f"{name}.bias"] = torch.zeros(outer)
    return weights
