"""Train a small Inf-DiT: python -m training.train RUN --photos FOLDER

EDM training (arXiv 2206.00364) of the network of arXiv 2405.04312 on crops of whole blocks. RUN is
a folder; calling again with the same one resumes after a kill without loss.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import signal
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
from infdit_core.whole_files import whole_file
from training.data import Photos, condition, reduce_bicubic
from training.degrade import reduce_realistic
from training.initial import initialise, look_at_input
from training.loss import edm_losses, local_weight, objective

STATE = "state.pt"
LOG = "log.csv"
SAMPLE_SEED = 1
DEGRADATIONS = ("bicubic", "realesrgan", "mixed")
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
        """Linear warm-up, then half a cosine to a hundredth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1, part))) / 2)


class Trainer:
    """The state of a run and one step of it."""

    def __init__(self, settings: Settings, photos: Photos, device: torch.device) -> None:
        self.settings, self.photos, self.device = settings, photos, device
        torch.manual_seed(settings.seed)
        if settings.checkpoint:
            self.model = load_model(settings.checkpoint, device).train().requires_grad_(True)
            if settings.fresh_positions:
                look_at_input(self.model)
        else:
            self.model = initialise(InfDiT(settings.config)).to(device)
        self.config = self.model.config
        if device.type == "cpu":
            self.model.attend = explicit_attention
        if settings.crop_px % self.config.block_px:
            raise ValueError(
                f"crop_px: expected a multiple of the block side {self.config.block_px},"
                f" got {settings.crop_px}"
            )
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = optimizers(self.model, settings)
        self.numpy = np.random.default_rng(settings.seed)
        self.torch = torch.Generator().manual_seed(settings.seed)
        self.step = 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One update. Returns the sigmas (B,) and the weighted losses (B,)."""
        settings = self.settings
        picture = self.photos.batch(settings.batch_size, self.numpy)
        cond, kept = self._drop(condition(self._reduce(picture), self._origin()))
        normal = stratified_normal(settings.batch_size, self.torch)
        sigma = (settings.p_mean + settings.p_std * normal).exp()
        noise = torch.randn(picture.shape, generator=self.torch)
        noisy = picture + sigma[:, None, None, None] * noise

        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            denoised = self.model.denoise(
                noisy.to(self.device), sigma.to(self.device), self._to_device(cond), Full()
            )
        error = denoised.float() - picture.to(self.device)
        self._objective(error, sigma.to(self.device), cond, kept).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return sigma, edm_losses(error.detach().cpu(), sigma)

    def _objective(self, error: Tensor, sigma: Tensor, cond: Condition, kept: Tensor) -> Tensor:
        known = None
        if self.settings.local_weight:
            known = (local_weight(cond.lr) * kept[:, None, None, None]).to(self.device)
        borders = self.config.patch_size, self.config.block_px
        return objective(error, sigma, known, borders, self.settings.border_weight)

    def _reduce(self, picture: Tensor) -> Tensor:
        """The LR pictures; of a mixed batch the first half is reduced bicubic."""
        count = {"bicubic": len(picture), "realesrgan": 0, "mixed": (len(picture) + 1) // 2}
        bicubic, realistic = picture.tensor_split([count[self.settings.degradation]])
        parts = []
        if len(bicubic):
            parts.append(reduce_bicubic(bicubic))
        if len(realistic):
            parts.append(reduce_realistic(realistic, self.numpy))
        return torch.cat(parts)

    def _origin(self) -> tuple[int, int]:
        """Random rotary start positions, whole blocks, so that a crop is like any other place."""
        blocks = self.numpy.integers(self.settings.max_origin_blocks, size=2)
        row, column = (int(n) * self.config.block_patches for n in blocks)
        return row, column

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

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.ema[name].lerp_(value, 1 - decay)

    def ema_model(self) -> InfDiT:
        model = InfDiT(self.config, device="meta")
        model.load_state_dict(self.ema, assign=True)
        return model.requires_grad_(False).eval()

    def save(self, path: Path) -> None:
        """Write the whole state: a run that is killed here keeps the last one."""
        state = {
            "settings": asdict(self.settings),
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "numpy": json.dumps(self.numpy.bit_generator.state),
            "torch": self.torch.get_state(),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.numpy.bit_generator.state = json.loads(state["numpy"])
        self.torch.set_state(state["torch"].cpu())


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
    stopping = False

    def stop(signum, frame):
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    saved = time.monotonic()
    sigmas, losses, started = [], [], time.monotonic()
    while trainer.step < stop_at and not stopping:
        sigma, loss = trainer.train_step()
        sigmas.append(sigma)
        losses.append(loss)
        if trainer.step % 50 == 0:
            seconds = (time.monotonic() - started) / len(losses)
            write_log(folder / LOG, trainer, torch.cat(sigmas), torch.cat(losses), seconds)
            sigmas, losses, started = [], [], time.monotonic()
        if time.monotonic() - saved > 60 * save_minutes:
            trainer.save(folder / STATE)
            saved = time.monotonic()
        if trainer.step % every == 0:
            save_sample(trainer, test, folder / f"sample_{trainer.step:06d}.png")
    trainer.save(folder / STATE)
    logger.info("stopped at step %d", trainer.step)


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
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    logger.info("%s", row)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run; resumed if it holds one")
    parser.add_argument("--photos", type=Path, required=True, help="what photos.py made")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    parser.add_argument("--every", type=int, default=500, help="steps between samples")
    parser.add_argument("--save-minutes", type=float, default=5, help="minutes between saves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Settings()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        elif name == "degradation":
            parser.add_argument(flag, choices=DEGRADATIONS, default=value)
        elif name == "optimizer":
            parser.add_argument(flag, choices=OPTIMIZERS, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
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
