"""Muon (Jordan et al., 2024) for the kernels of convolutions and the matrices of a transformer.

`torch.optim.Muon` takes matrices only, one after the other. Here all of one shape are made
orthogonal together, and a kernel (out, in, 3, 3) is the matrix (out, 9 · in).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

UPDATE_RMS = 0.2
"""Of the rate: what AdamW's updates have, so that one rate suits both."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal: all directions learn at one speed."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for same in shapes.values():
                grads = [p.grad for p in same]
                moments = [self.state[p].setdefault("moment", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov
                stack = torch.stack([m.flatten(1) for m in ahead])
                update = orthogonal(stack) * (UPDATE_RMS * max(stack.shape[-2:]) ** 0.5)
                updates = [u.view_as(p) for u, p in zip(update.to(same[0]), same, strict=True)]
                if group["weight_decay"]:
                    torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, updates, alpha=-group["lr"])


def orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """(N, rows, columns) to matrices near U·Vᵀ of their singular value decompositions, in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(
    inner: Iterable[nn.Parameter],
    model: nn.Module,
    rate: float,
    other_rate: float,
    weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """Muon for `inner` matrices and kernels, which alone decay, Adam for all other parameters."""
    inner = [p for p in inner if p.ndim >= 2]
    chosen = set(map(id, inner))
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [torch.optim.Adam(other, other_rate, betas=(0.9, 0.99))]
    if inner:
        found.append(Muon(inner, rate, weight_decay=weight_decay))
    return found


def cosine(
    found: list[torch.optim.Optimizer], rates: list[list[float]], step: int, part: float
) -> None:
    """Set the rates: risen over 100 steps, constant for 0.3 of the time, then a cosine to 0.005.

    Args:
        rates: of each group of each optimizer at the start.
        part: of the time that has passed.
    """
    ramp = min(1, (step + 1) / 100)
    wave = (1 + math.cos(math.pi * min(1, max(0, (part - 0.3) / 0.7)))) / 2
    for optimizer, start in zip(found, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * ramp * (0.005 + 0.995 * wave)


def warm_cosine(rate: float, step: int, warmup_steps: int, total_steps: int) -> float:
    """The rate of a step: linear warm-up, then half a cosine to a hundredth."""
    if step < warmup_steps:
        return rate * (step + 1) / warmup_steps
    part = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1, part))) / 2)
