"""Linear layers in 8-bit floating point, for devices that multiply it: NVIDIA's of 2022 and later.

Weights are kept in float8_e4m3fn with a scale per output, activations are rounded to it with a
scale per token. Elsewhere the same rounding is computed in float32, to measure the error it brings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max
_FIRST_CAPABILITY = (8, 9)


def use_fp8(net: nn.Module) -> None:
    """Replace every linear layer inside the transformer layers of an `InfDiT`, in place."""
    for layer in net.get_submodule("layers").children():
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, Fp8Linear(module))


def is_fast(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit numbers itself."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


class Fp8Linear(nn.Module):
    """A linear layer with rounded weights and inputs.

    Args:
        linear: whose weights are taken.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _round(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in features) to (..., out features), in the dtype of x."""
        rounded, scale = _round(x.flatten(0, -2))
        if is_fast(x.device):
            out = torch._scaled_mm(
                rounded,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                out_dtype=torch.bfloat16,
            ).to(x.dtype)
        else:
            out = F.linear(rounded.float(), self.weight.float()) * scale * self.scale.t()
        return (out + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def _round(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, m) as 8-bit numbers, and the float32 (n, 1) that they are to be multiplied by."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(DTYPE), scale
