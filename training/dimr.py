"""Train a small DiMR: python -m training.dimr RUN --data FILE

The noise prediction of arXiv 2406.09416 with a loss at every stage, on latents of classes. RUN is a
folder; calling again with the same one resumes after a kill without loss, and at every stop the
averaged weights are written to RUN/model.safetensors.

FILE is an .npz or .safetensors file of `latents` (N, channels, side, side), for SD 1.5's VAE times
0.18215, and `labels` (N,), integers below 1000. A network of other sizes than an ImageNet model's
is of no use in ComfyUI unless a VAE fits its latents.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from infdit_core.dimr.config import CLASSES, HEADS_KEY, NULL_CLASS, XL_2R, DiMRConfig, StageConfig
from infdit_core.dimr.layers import LayerNorm, TimeDependent
from infdit_core.dimr.model import DiMR
from infdit_core.dimr.names import release_state_dict
from infdit_core.dimr.sampling import STEPS, sigma_of
from infdit_core.whole_files import whole_file
from training.export import head
from training.resumable import LOG, STATE, Resumable, add_row, add_settings, steps

MODEL = "model.safetensors"
BETAS = (0.99, 0.99)
"""Of AdamW, the authors'."""
COARSE_WEIGHT = 0.25
"""Of the loss of every stage but the last, whose weight is 1."""
INITIAL_STD = 0.02
"""Of weights at the widths of the authors' models."""
CHANGEABLE = ("learning_rate", "ema_decay", "total_steps")
"""Settings that are taken from the command line when a run is resumed."""

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """A run. Two stages as in XL/2R; all but what is `CHANGEABLE` is fixed when it starts."""

    width: int = 192
    """Of the transformer at half the latent's side; the ConvNeXt blocks have half of it."""
    heads: int = 6
    blocks: int = 7
    fine_blocks: int = 5
    kernel: int = 7
    batch_size: int = 64
    learning_rate: float = 2e-4
    warmup_steps: int = 500
    total_steps: int = 20_000
    ema_decay: float = 0.9999
    weight_decay: float = 0.03
    grad_clip: float = 1.0
    class_dropout: float = 0.1
    bf16: bool = False
    seed: int = 0

    def config(self, channels: int, side: int) -> DiMRConfig:
        """Of latents (channels, side, side); the side is even."""
        fine = self.width // 2
        config = DiMRConfig(
            (
                StageConfig(
                    self.width, 2 * self.width, self.blocks, side // 2, 2, 3, heads=self.heads
                ),
                StageConfig(fine, 2 * fine, self.fine_blocks, side, 1, 3, kernel=self.kernel),
            ),
            channels,
        )
        config.validate()
        return config

    def rate(self, step: int) -> float:
        """Of a step: a linear warm-up, then the same, as the authors have it."""
        return self.learning_rate * min(1, (step + 1) / max(1, self.warmup_steps))


class Trainer(Resumable[DiMR]):
    """The state of a run and one step of it.

    Args:
        latents: (N, channels, side, side).
        labels: (N,) integers.
    """

    settings: Settings

    def __init__(
        self, settings: Settings, latents: Tensor, labels: Tensor, device: torch.device
    ) -> None:
        self.latents, self.labels, self.device = latents, labels, device
        torch.manual_seed(settings.seed)
        config = settings.config(latents.shape[1], latents.shape[-1])
        model = initialise(DiMR(config)).to(device)
        super().__init__(settings, model, [optimizer(model, settings)], settings.seed)

    def train_step(self) -> Tensor:
        """One update. Returns the mean squared error of every stage, from coarse to fine."""
        settings = self.settings
        chosen = torch.randint(len(self.labels), (settings.batch_size,), generator=self.torch)
        dropped = torch.rand(settings.batch_size, generator=self.torch) < settings.class_dropout
        classes = self.labels[chosen].masked_fill(dropped, NULL_CLASS).to(self.device)
        n = torch.randint(1, STEPS + 1, (settings.batch_size,), generator=self.torch)
        t = n / STEPS
        latents = self.latents[chosen].float()
        noise = torch.randn(latents.shape, generator=self.torch)
        noisy = add_noise(latents, noise, t).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            outputs = self.model.outputs(noisy, t.to(self.device), classes)
        errors = stage_errors(outputs, noise.to(self.device))
        objective(errors).backward()
        self.update(settings.rate(self.step), settings.grad_clip, settings.ema_decay)
        return errors.detach().cpu()

    def export(self, path: Path, commit: str) -> None:
        """Write the averaged weights under the release's names."""
        notes = {
            "dimr.training": json.dumps(asdict(self.settings)),
            "dimr.steps": str(self.step),
            "dimr.commit": commit,
            "format": "pt",
            HEADS_KEY: str(self.settings.heads),
        }
        tensors = {k: v.cpu().contiguous() for k, v in release_state_dict(self.ema).items()}
        with whole_file(path) as file:
            file.write(save(tensors, notes))


def add_noise(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The latents (B, C, H, W) at times (B,), in the scale that the network takes."""
    sigma = sigma_of(t)[:, None, None, None]
    return (latents + sigma * noise) / (1 + sigma**2).sqrt()


def stage_errors(outputs: list[Tensor], noise: Tensor) -> Tensor:
    """(stages,) mean squared errors of predictions of the noise (B, C, H, W).

    That of a coarse stage is the sum of each r×r square divided by r: of variance 1 as well.
    """
    ratios = [noise.shape[-1] // out.shape[-1] for out in outputs]
    targets = [r * F.avg_pool2d(noise, r) for r in ratios]
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(out.float() - target).square().mean() for out, target in pairs])


def objective(errors: Tensor) -> Tensor:
    """The weighted sum of `stage_errors`."""
    return COARSE_WEIGHT * errors[:-1].sum() + errors[-1]


def initialise(model: DiMR) -> DiMR:
    """As the authors' models start: small weights, norms that do nothing and ignore time.

    Convolutions start as PyTorch has them; nothing is zero but biases. A network narrower than
    theirs gets larger weights, so that its branches start as large beside the stream as theirs.
    """
    width = model.config.stages[0].dim
    std = INITIAL_STD * max(1, XL_2R.stages[0].dim / width) ** 0.5
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    # Parents come before their parts in modules(): these overwrite what an Embedding got above.
    biases = {id(module.bias) for module in model.modules() if isinstance(module, LayerNorm)}
    for module in model.modules():
        if isinstance(module, TimeDependent):
            rows = nn.init.zeros_(module.rows.weight)
            if id(module) not in biases:
                nn.init.ones_(rows[:2])
    return model


def optimizer(model: DiMR, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, without decay of norms.

    The authors let the ends of a vector that depends on time decay and its way between them not;
    here they are one tensor.
    """
    norms = [module.rows.weight for module in model.modules() if isinstance(module, TimeDependent)]
    chosen = set(map(id, norms))
    other = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": other}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
    )


def read_data(path: Path) -> tuple[Tensor, Tensor]:
    """The latents and labels of a file.

    Raises:
        ValueError: they are not what the module's docstring says.
    """
    if path.suffix == ".npz":
        with np.load(path) as file:
            found: Mapping[str, Tensor] = {name: torch.from_numpy(file[name]) for name in file}
    else:
        found = load_file(path)
    if missing := {"latents", "labels"} - found.keys():
        raise ValueError(f"{path.name}: expected latents and labels, without {sorted(missing)}")
    latents, labels = found["latents"], found["labels"]
    if (
        latents.ndim != 4
        or 0 in latents.shape
        or latents.shape[-1] != latents.shape[-2]
        or latents.shape[-1] % 2
    ):
        raise ValueError(
            f"{path.name}: expected latents (N, channels, side, side) of an even side,"
            f" got {tuple(latents.shape)}"
        )
    if labels.shape != latents.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{path.name}: expected {len(latents)} integers as labels,"
            f" got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path.name}: expected labels from 0 to {CLASSES - 1}")
    return latents, labels.long()


def run(folder: Path, trainer: Trainer, stop_at: int, every: int, save_minutes: float) -> None:
    """Train until `stop_at` steps; a row of the log every `every`, the model at the end."""
    errors, started = [], time.monotonic()
    for _ in steps(trainer, folder / STATE, stop_at, save_minutes):
        errors.append(trainer.train_step())
        if trainer.step % every == 0:
            seconds = round((time.monotonic() - started) / len(errors), 4)
            means = torch.stack(errors).mean(dim=0)
            stages = {f"error_{n}": round(x, 5) for n, x in enumerate(means.tolist())}
            loss = round(objective(means).item(), 5)
            add_row(
                folder / LOG,
                {"step": trainer.step, "loss": loss, **stages, "seconds_per_step": seconds},
            )
            errors, started = [], time.monotonic()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run; resumed if it holds one")
    parser.add_argument("--data", type=Path, required=True, help="latents and labels")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    parser.add_argument("--every", type=int, default=50, help="steps between rows of the log")
    parser.add_argument("--save-minutes", type=float, default=5, help="minutes between saves")
    parser.add_argument("--commit", help="of the trainer; that of this checkout if left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_settings(parser, Settings(), {})
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    commit = args.commit or head()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # vanishing gradients are many times slower on a CPU
    state = args.run / STATE
    if state.exists():
        settings = Settings(**torch.load(state, mmap=True, weights_only=True)["settings"])
        for name in CHANGEABLE:
            setattr(settings, name, getattr(args, name))
    trainer = Trainer(settings, *read_data(args.data), torch.device(args.device))
    if state.exists():
        trainer.load(state)
        logger.info("resumed at step %d", trainer.step)
    run(args.run, trainer, args.stop_at or settings.total_steps, args.every, args.save_minutes)
    trainer.export(args.run / MODEL, commit)


if __name__ == "__main__":
    main()
