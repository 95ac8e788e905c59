"""Train a small Inf-DiT: python -m training.train RUN --photos FOLDER

EDM training (arXiv 2206.00364) of the network of arXiv 2405.04312 on crops of whole blocks. RUN is
a folder; calling again with the same one resumes after a kill without loss.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from infdit_core.blocks.schedules import Full
from infdit_core.checkpoints.load import load_model
from infdit_core.edm import edm_sigmas
from infdit_core.network.condition import Condition
from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.sampling import sample
from training.data import Photos, condition, random_origin, reduce_bicubic
from training.degrade import DEGRADATIONS, reduce_as
from training.initial import initialise, look_at_input
from training.loss import edm_losses, local_weight, objective
from training.muon import warm_cosine
from training.resumable import LOG, STATE, Resumable, add_row, add_settings, steps

SAMPLE_SEED = 1
OPTIMIZERS = ("adamw", "muon")
CHANGEABLE = ("total_steps", "p_mean", "p_std", "local_weight", "border_weight")
"""Settings that are taken from the command line when a run is resumed."""
LEVELS = (0.0, 0.1, 0.3, 1.0, math.inf)
"""Bounds of sigma between which the log averages the loss."""

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """A run. All but what is `CHANGEABLE` is fixed when it starts."""

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    block_px: int = 32
    crop_px: int = 128
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    total_steps: int = 20_000
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    p_mean: float = -1.0
    p_std: float = 1.4
    lr_dropout: float = 0.07
    local_weight: bool = False
    """Let errors also weigh by what the LR picture tells of their place: `loss.local_weight`."""
    border_weight: float = 0.0
    """Weight of `loss.border_jumps`, beside the plain squared error's of 1."""
    degradation: str = DEGRADATIONS[0]
    max_origin_blocks: int = 256
    optimizer: str = OPTIMIZERS[0]
    bf16: bool = False
    seed: int = 0
    checkpoint: str = ""
    """File to start from; it then sets the sizes. Empty for random weights."""
    fresh_positions: bool = False
    """With a checkpoint: let its cross attention look at the LR picture as a new model's does."""

    @property
    def config(self) -> InfDiTConfig:
        return InfDiTConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            patch_size=4,
            block_patches=self.block_px // 4,
            mlp_size=4 * self.hidden_size,
            vector_size=0,
        )

    def rate(self, step: int) -> float:
        """Of a step, as of `warm_cosine`."""
        return warm_cosine(self.learning_rate, step, self.warmup_steps, self.total_steps)


class Trainer(Resumable[InfDiT]):
    """The state of a run and one step of it."""

    settings: Settings

    def __init__(self, settings: Settings, photos: Photos, device: torch.device) -> None:
        self.photos, self.device = photos, device
        torch.manual_seed(settings.seed)
        if settings.checkpoint:
            model = load_model(settings.checkpoint, device).train().requires_grad_(True)
            if settings.fresh_positions:
                look_at_input(model)
        else:
            model = initialise(InfDiT(settings.config)).to(device)
        if device.type == "cpu":
            model.attend = explicit_attention
        if settings.crop_px % model.config.block_px:
            raise ValueError(
                f"crop_px: expected a multiple of the block side {model.config.block_px},"
                f" got {settings.crop_px}"
            )
        super().__init__(settings, model, optimizers(model, settings), settings.seed)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One update. Returns the sigmas (B,) and the weighted losses (B,)."""
        settings = self.settings
        picture = self.photos.batch(settings.batch_size, self.numpy)
        lr = reduce_as(settings.degradation, picture, self.numpy)
        origin = random_origin(self.numpy, self.config.block_patches, settings.max_origin_blocks)
        cond, kept = self._drop(condition(lr, origin))
        normal = stratified_normal(settings.batch_size, self.torch)
        sigma = (settings.p_mean + settings.p_std * normal).exp()
        noise = torch.randn(picture.shape, generator=self.torch)
        noisy = picture + sigma[:, None, None, None] * noise

        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            denoised = self.model.denoise(
                noisy.to(self.device), sigma.to(self.device), self._to_device(cond), Full()
            )
        error = denoised.float() - picture.to(self.device)
        self._objective(error, sigma.to(self.device), cond, kept).mean().backward()
        self.update(settings.rate(self.step), settings.grad_clip, settings.ema_decay)
        return sigma, edm_losses(error.detach().cpu(), sigma)

    def _objective(self, error: Tensor, sigma: Tensor, cond: Condition, kept: Tensor) -> Tensor:
        known = None
        if self.settings.local_weight:
            known = (local_weight(cond.lr) * kept[:, None, None, None]).to(self.device)
        borders = self.config.patch_size, self.config.block_px
        return objective(error, sigma, known, borders, self.settings.border_weight)

    def _drop(self, cond: Condition) -> tuple[Condition, Tensor]:
        """Without the LR picture now and then, as the paper trains; and (B,) 1 where it is kept."""
        kept = (
            torch.rand(cond.lr.shape[0], generator=self.torch) >= self.settings.lr_dropout
        ).float()
        mask = kept[:, None, None, None]
        return Condition(cond.concat * mask, cond.lr * mask, self._vector(), cond.origin), kept

    def _vector(self) -> Tensor | None:
        """A model with CLIP is trained here as without its description, which is zero."""
        if not self.config.vector_size:
            return None
        return torch.zeros(self.settings.batch_size, self.config.vector_size)

    def _to_device(self, cond: Condition) -> Condition:
        vector = None if cond.vector is None else cond.vector.to(self.device)
        return replace(
            cond, concat=cond.concat.to(self.device), lr=cond.lr.to(self.device), vector=vector
        )


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its scores in memory: on a CPU a whole step is 1.3 times as fast with it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def optimizers(model: InfDiT, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices inside the layers and AdamW for everything else."""
    inner, other = [], list(model.parameters())
    if settings.optimizer == "muon":
        inner = [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]
        chosen = set(map(id, inner))
        other = [p for p in other if id(p) not in chosen]
    rate, decay = settings.learning_rate, settings.weight_decay
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(other, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    ]
    if inner:
        found.append(
            torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def stratified_normal(size: int, generator: torch.Generator) -> Tensor:
    """(size,) standard normal values, one from each of `size` equally likely ranges.

    Each alone is normal; together they cover the noise levels, so the loss varies less.
    """
    ranges = torch.randperm(size, generator=generator)
    uniform = (ranges + torch.rand(size, generator=generator)) / size
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))


def save_sample(trainer: Trainer, test: Tensor, path: Path) -> None:
    """Rows of bicubic, ours, original for test crops (B, 3, H, W)."""
    cond = condition(reduce_bicubic(test))
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(SAMPLE_SEED))
    model = trainer.ema_model().cpu()
    result = sample(model, cond, edm_sigmas(12), noise=noise)
    rows = torch.cat([cond.concat, result.clamp(-1, 1), test], dim=3)
    levels = ((rows + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(torch.cat(list(levels), dim=1).permute(1, 2, 0).numpy()).save(path)


def run(
    folder: Path, trainer: Trainer, test: Tensor, stop_at: int, every: int, save_minutes: float
) -> None:
    """Train until `stop_at` steps; a sample every `every` steps, the state every `save_minutes`."""
    sigmas, losses, started = [], [], time.monotonic()
    for _ in steps(trainer, folder / STATE, stop_at, save_minutes):
        sigma, loss = trainer.train_step()
        sigmas.append(sigma)
        losses.append(loss)
        if trainer.step % 50 == 0:
            seconds = (time.monotonic() - started) / len(losses)
            write_log(folder / LOG, trainer, torch.cat(sigmas), torch.cat(losses), seconds)
            sigmas, losses, started = [], [], time.monotonic()
        if trainer.step % every == 0:
            save_sample(trainer, test, folder / f"sample_{trainer.step:06d}.png")


def write_log(path: Path, trainer: Trainer, sigma: Tensor, loss: Tensor, seconds: float) -> None:
    names = [f"loss_{low}_{high}" for low, high in pairwise(LEVELS)]
    row = {
        "step": trainer.step,
        "loss": loss.mean().item(),
        "rate": trainer.settings.rate(trainer.step),
        "seconds_per_step": round(seconds, 4),
    }
    for name, (low, high) in zip(names, pairwise(LEVELS), strict=True):
        chosen = loss[(sigma >= low) & (sigma < high)]
        row[name] = chosen.mean().item() if len(chosen) else ""
    add_row(path, row)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run; resumed if it holds one")
    parser.add_argument("--photos", type=Path, required=True, help="what photos.py made")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    parser.add_argument("--every", type=int, default=500, help="steps between samples")
    parser.add_argument("--save-minutes", type=float, default=5, help="minutes between saves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_settings(parser, Settings(), {"degradation": DEGRADATIONS, "optimizer": OPTIMIZERS})
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # vanishing gradients are many times slower on a CPU
    state = args.run / STATE
    if state.exists():
        settings = Settings(**torch.load(state, weights_only=True)["settings"])
        for name in CHANGEABLE:
            setattr(settings, name, getattr(args, name))
    trainer = Trainer(
        settings, Photos(args.photos / "train", settings.crop_px), torch.device(args.device)
    )
    if state.exists():
        trainer.load(state)
        logger.info("resumed at step %d", trainer.step)
    test = Photos(args.photos / "test", 128).batch(6, np.random.default_rng(SAMPLE_SEED))
    stop_at = args.stop_at or settings.total_steps
    run(args.run, trainer, test, stop_at, args.every, args.save_minutes)


if __name__ == "__main__":
    main()
