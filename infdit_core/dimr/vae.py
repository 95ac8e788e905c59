"""The decoder of SD 1.5's autoencoder.

Own code, because diffusers would bring 62 MB and 5 s of imports for these few layers.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint, require_tensors
from ..checkpoints.foreign import describe_tensors
from .sampling import LATENT_SCALE

_EXPECTED = "expected the VAE of Stable Diffusion 1.5, or a whole checkpoint that has it"
_MARK = "decoder.conv_in.weight"
_MULTIPLES = (4, 4, 2, 1)
"""Channels of the levels, from the coarsest, by those of the finest."""
LATENT_CHANNELS = 4
_BLOCKS, _GROUPS = 3, 32
_WIDTHS = range(_GROUPS, 513, _GROUPS)
"""Channels of the finest level that are taken; SD 1.5 has 128."""

_FROM_DIFFUSERS = {
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"up_blocks\.(\d)": lambda level: f"up.{len(_MULTIPLES) - 1 - int(level[1])}",
    r"\.resnets\.": ".block.",
    r"\.upsamplers\.0\.": ".upsample.",
    r"\.group_norm\.": ".norm.",
    r"\.(?:to_)?([qkv])(?:uery|ey|alue)?\.": r".\1.",
    r"\.(to_out\.0|proj_attn)\.": ".proj_out.",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
"""What the files of diffusers call otherwise than those of Stable Diffusion's authors."""

_Norm = partial(nn.GroupNorm, _GROUPS, eps=1e-6)
_Conv = partial(nn.Conv2d, kernel_size=3, padding=1)


class _Block(nn.Module):
    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(dim_in), _Conv(dim_in, dim)
        self.norm2, self.conv2 = _Norm(dim), _Conv(dim, dim)
        self.nin_shortcut = nn.Identity() if dim_in == dim else nn.Conv2d(dim_in, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _Norm(dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            rearrange(conv(normed), "b c h w -> b (h w) c") for conv in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # (B, h w, c)
        return x + self.proj_out(rearrange(out, "b (h w) c -> b c h w", h=x.shape[2]))


class _Upsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _Conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


def _layers(width: int) -> dict[str, nn.Module]:
    """All layers in their order; SD 1.5's `width` is 128."""
    dim = _MULTIPLES[0] * width
    layers: dict[str, nn.Module] = {
        "post_quant_conv": nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1),
        "decoder.conv_in": _Conv(LATENT_CHANNELS, dim),
        "decoder.mid.block_1": _Block(dim, dim),
        "decoder.mid.attn_1": _Attention(dim),
        "decoder.mid.block_2": _Block(dim, dim),
    }
    for n, multiple in enumerate(_MULTIPLES):
        level = f"decoder.up.{len(_MULTIPLES) - 1 - n}"  # 0 is the finest
        for block in range(_BLOCKS):
            layers[f"{level}.block.{block}"] = _Block(dim, multiple * width)
            dim = multiple * width
        if n < len(_MULTIPLES) - 1:
            layers[f"{level}.upsample"] = _Upsample(dim)
    return layers | {
        "decoder.norm_out": _Norm(dim),
        "": nn.SiLU(),
        "decoder.conv_out": _Conv(dim, 3),
    }


def read_decoder(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Read the decoder from a file of Stable Diffusion's authors or of diffusers, in float32.

    Raises:
        CheckpointError: some other model, or not all of it.
    """
    with open_checkpoint(path) as checkpoint:
        vae = _renamed(checkpoint)
        with torch.device("meta"):
            layers = _layers(vae.shapes[_MARK][0] // _MULTIPLES[0])
        states = {f"{name}.": layer.state_dict() for name, layer in layers.items()}
        needed = {
            name + key: tuple(tensor.shape)
            for name, state in states.items()
            for key, tensor in state.items()
        }
        require_tensors(vae, needed, "the decoder of Stable Diffusion 1.5's VAE")
        for layer, (name, state) in zip(layers.values(), states.items(), strict=True):
            read = {key: vae.tensor(name + key).to(device, torch.float32) for key in state}
            layer.load_state_dict(read, assign=True)
    return nn.Sequential(*layers.values()).requires_grad_(False)


def decode(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Latents (B, 4, h, w), as the network predicts them, to pictures (B, 8h, 8w, 3) in 0..1."""
    pictures = decoder(latents / LATENT_SCALE)  # (B, 3, 8h, 8w) in -1..1
    return ((pictures + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """The decoder under its authors' names; linear layers become convolutions of 1×1."""
    names, shapes = {}, {}
    for key, shape in checkpoint.shapes.items():
        name = key.removeprefix("first_stage_model.")
        if name.startswith(("decoder.", "post_quant_conv.")):
            for theirs, ours in _FROM_DIFFUSERS.items():
                name = re.sub(theirs, ours, name)
            names[name] = key
            shapes[name] = (*shape, 1, 1) if ".attn_1." in name and len(shape) == 2 else shape
    widths = [n * _MULTIPLES[0] for n in _WIDTHS]
    of_sdxl = any(key.startswith("conditioner.") for key in checkpoint.shapes)  # another scale
    if of_sdxl or shapes.get(_MARK, (0,))[0] not in widths:
        found = describe_tensors(checkpoint.shapes)
        raise CheckpointError(f"{checkpoint.path.name} {found}; {_EXPECTED}")
    dtypes = {name: checkpoint.dtypes[key] for name, key in names.items()}

    def read(name: str) -> Tensor:
        return checkpoint.tensor(names[name]).reshape(shapes[name])

    return Checkpoint(checkpoint.path, shapes, dtypes, read)
