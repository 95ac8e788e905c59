"""Few steps for any checkpoint: python -m training.distil CHECKPOINT OUT --photos PHOTOS

The student starts as the model itself and samples as the engine will, by Euler's method at the
noise levels of --sigmas. From where a step of it begins, the frozen model solves its own ODE in
more steps to where that step ends; the student's D is to be the one whose single step goes there.
More steps are those that the model's file asks for, where it does: a model that was tuned for few
levels need not be better between them (the bundled one is not).

That is progressive distillation (arXiv 2202.00512) in one round, on the student's own path as in
DMD2 (arXiv 2405.14867), so that a later step knows what the earlier ones leave. It was chosen for
what it keeps: the engine's deterministic solver, and for each seed the picture that many steps of
the model draw, which is also what is measured while it runs. Consistency tuning (ECT, arXiv
2406.14548) has D jump to the end from every level, and takes further steps by fresh noise, which no
solver here adds. DMD2 itself matches distributions, for which it trains a third network of the
model's size. What a regression falls short of is blur: a weak adversary on features (`--features`)
is there for the last step, whose D is a finished picture.

OUT is a folder: the state, from which a stopped run goes on; log.csv; and model.safetensors, whose
preset `auto` is the student's. The released size fits one GPU of 80 GB by estimate, with --bf16 and
--recompute.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infdit_core.checkpoints.checkpoint import open_checkpoint
from infdit_core.checkpoints.load import load_model
from infdit_core.checkpoints.names import CLIP_PREFIX
from infdit_core.clip import ClipGuide, read_clip
from infdit_core.edm import SIGMA_MIN, edm_sigmas
from infdit_core.errors import InfDiTError
from infdit_core.network.condition import Condition
from infdit_core.network.config import LR_SCALE
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import interpolate
from infdit_core.sampling import AUTO, AUTO_KEY, check_sigmas, find_preset, sample
from training import export, features
from training.data import Photos, middle, random_origin
from training.degrade import DEGRADATIONS, reduce_as
from training.loss import loss_weight
from training.muon import warm_cosine
from training.prior import enlarged, gain
from training.resumable import LOG, STATE, Resumable, add_row, add_settings, steps

MODEL = "model.safetensors"
CHANGEABLE = ("total_steps",)
"""Settings that are taken from the command line when a run is resumed."""
FILES = ("checkpoint", "features", "clip")
"""Settings that a model's file does not tell: they name places of this machine."""
GRAD_CLIP = 1.0
TEST_SEED, TEST_CROPS = 1, 4


@dataclass
class Settings:
    """A run. All but what is `CHANGEABLE` is fixed when it starts."""

    checkpoint: str
    """The model: a file, with a prior or without."""
    sigmas: str = "40,6.5,1.7,0.5"
    """Noise levels of the student's steps; the first is where the model's sampling starts."""
    teacher_steps: int = 0
    """Of Heun's method, to each of the student's; 0 for what the file asks for, else 4."""
    crop_blocks: int = 4
    """Side of a crop in blocks."""
    batch_size: int = 4
    learning_rate: float = 1e-5
    warmup_steps: int = 50
    total_steps: int = 3000
    ema_decay: float = 0.995
    adversary: float = 0.05
    """Length of the adversary's gradient, of that of the pixels."""
    features: str = ""
    """What training.features wrote; empty for no adversary."""
    clip: str = ""
    """CLIP towers for a model that takes an embedding and whose file has none."""
    degradation: str = DEGRADATIONS[0]
    bf16: bool = False
    """Compute in bf16; the student's weights stay fp32."""
    recompute: bool = False
    """Compute the layers again for their gradients instead of keeping what they need."""
    seed: int = 0

    def levels(self, sigma_max: float) -> list[float]:
        """The noise levels, without the 0 that follows.

        Raises:
            InfDiTError: they are no numbers that fall from `sigma_max`.
        """
        try:
            levels = [float(level) for level in self.sigmas.split(",")]
        except ValueError as error:
            raise InfDiTError(f"sigmas: expected numbers, got {self.sigmas!r}") from error
        check_sigmas(torch.tensor([*levels, 0.0]))
        if levels[0] != sigma_max:
            raise InfDiTError(f"sigmas: this model's first is {sigma_max:g}, got {levels[0]:g}")
        return levels


class Distiller(Resumable[InfDiT]):
    """The state of a run and one step of it."""

    settings: Settings

    def __init__(self, settings: Settings, photos: Path, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(settings.seed)
        path = settings.checkpoint
        self.teacher = load_model(path, device, torch.bfloat16 if settings.bf16 else torch.float32)
        model = load_model(path, device).train().requires_grad_(True)
        if model.prior is not None:
            model.prior.requires_grad_(False)
        if settings.recompute:
            recompute_layers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, settings.learning_rate, (0.9, 0.99), weight_decay=0)
        super().__init__(settings, model, [optimizer], settings.seed)
        self.levels = settings.levels(self.config.sigma_max)
        self.guide = None
        if self.config.vector_size:
            self.guide = ClipGuide.from_state_dict(read_clip(settings.clip or path), device=device)
        self.adversary = None
        if settings.features:
            lite0 = features.read(Path(settings.features))
            self.adversary = features.Adversary(lite0, device)
        # the prior of a crop knows what lies around it
        self._edge = 0 if model.prior is None else LR_SCALE * model.prior.reach
        side = settings.crop_blocks * self.config.block_px + 2 * self._edge
        self._photos = Photos(photos / "train", side)
        self._test = self.pictures(
            Photos(photos / "test", side).batch(TEST_CROPS, np.random.default_rng(TEST_SEED)),
            np.random.default_rng(TEST_SEED),
        )
        self._many: Tensor | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    @torch.no_grad()
    def pictures(
        self, pictures: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, Condition]:
        """Photographs and their condition as the engine makes it, the prior's edge cut off."""
        lr = reduce_as(self.settings.degradation, pictures, generator).to(self.device)
        vector = None if self.guide is None else self.guide.guide((lr.movedim(1, -1) + 1) / 2)
        prior = self.teacher.prior
        with self.autocast():
            concat = interpolate(lr) if prior is None else enlarged(prior, lr)
        origin = random_origin(generator, self.config.block_patches)
        edge = self._edge
        cond = Condition(middle(concat, edge), middle(lr, edge // LR_SCALE), vector, origin)
        return middle(pictures, edge).to(self.device), cond

    def train_step(self) -> dict[str, float]:
        """One update, of one of the student's steps in turn. Returns the losses."""
        settings, n = self.settings, self.step % len(self.levels)
        sigma, following = self.levels[n], [*self.levels, 0.0][n + 1]
        photos = self._photos.batch(settings.batch_size, self.numpy)
        originals, cond = self.pictures(photos, self.numpy)
        noise = torch.randn(originals.shape, generator=self.torch).to(self.device)
        x = self.drawn(self.model, cond, noise, n)
        end = self.solved(x, cond, n)
        aim = (sigma * end - following * x) / (sigma - following)
        with self.autocast():
            ours = self.model.denoise(x, sigma, cond).float()
        weight = loss_weight(torch.tensor(sigma), self.config.sigma_data).item()
        gradient = weight * 2 / ours.numel() * (ours.detach() - aim)
        losses: dict[str, float] = {"loss": weight * (ours.detach() - aim).square().mean().item()}
        if self.adversary is not None and following == 0:
            beside = self.adversary.gradient(ours, gradient)
            gradient = gradient + settings.adversary * beside
            losses["judge"] = self.adversary.learn(originals, ours).item()
        ours.backward(gradient)
        rate = warm_cosine(
            settings.learning_rate, self.step, settings.warmup_steps, settings.total_steps
        )
        self.update(rate, GRAD_CLIP, settings.ema_decay)
        return losses

    def drawn(self, model: InfDiT, cond: Condition, noise: Tensor, count: int) -> Tensor:
        """Where a model is after `count` steps of the student's, from a picture plus noise."""
        if not count:
            return cond.concat + self.levels[0] * noise
        sigmas = torch.tensor([*self.levels, 0.0][: count + 1])
        with self.autocast():
            return sample(model, cond, sigmas, noise=noise, solver="euler")

    def solved(self, x: Tensor, cond: Condition, n: int) -> Tensor:
        """Where the teacher's ODE leads from x, (B, 3, H, W), over step n of the student's."""
        solver, sigmas = self.path(n)
        nothing = torch.zeros_like(x)
        return sample(self.teacher, cond, sigmas, noise=nothing, start=x, solver=solver)

    def path(self, n: int) -> tuple[str, Tensor]:
        """Solver and noise levels of the teacher over step n of the student's."""
        count, (sigma, following) = self.settings.teacher_steps, [*self.levels, 0.0][n : n + 2]
        own = find_preset(AUTO, self.model.metadata)
        if own.shares and not count:
            levels = own.sigmas(sigma_max=self.config.sigma_max).tolist()
            between = [level for level in levels if following < level < sigma]
            return own.solver, torch.tensor([sigma, *between, following])
        count = count or 4
        if following:  # ends there; the 0 behind it is left out
            return "heun", edm_sigmas(count + 1, following, sigma)[:-1]
        return "heun", edm_sigmas(count, min(SIGMA_MIN, sigma), sigma)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Of held-out crops: how far few steps are from many, in levels of 255; dB over bicubic."""
        originals, cond = self._test
        generator = torch.Generator().manual_seed(TEST_SEED)
        noise = torch.randn(originals.shape, generator=generator).to(self.device)
        if self._many is None:
            self._many = self.drawn(self.teacher, cond, noise, 0)
            for n in range(len(self.levels)):
                self._many = self.solved(self._many, cond, n)
        few = self.drawn(self.ema_model(), cond, noise, len(self.levels))
        off = 127.5 * (few - self._many).square().mean().sqrt().item()
        values = {"many": self._many, "few": few}
        gains = {f"gain_{name}": gain(x, cond.lr, originals) for name, x in values.items()}
        return {"off": round(off, 4), **gains}

    def state(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else {"adversary": self.adversary.state()}
        return super().state() | adversary

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.adversary is not None:
            self.adversary.restore(state["adversary"])

    def export(self, out: Path, commit: str) -> None:
        """Write the averaged weights, with all that the source's file says and its CLIP tower."""
        source = self.model.metadata
        preset = {
            "solver": "euler",
            "shares": [sigma / self.levels[0] for sigma in self.levels],
            "consistency": find_preset(AUTO, source).consistency,
        }
        settings = {k: v for k, v in asdict(self.settings).items() if k not in FILES}
        notes = {
            **source,
            AUTO_KEY: json.dumps(preset),
            "infdit.distilled": json.dumps({"step": self.step, "commit": commit, **settings}),
        }
        with open_checkpoint(self.settings.checkpoint) as file:
            towers = {k: file.tensor(k) for k in file.shapes if k.startswith(CLIP_PREFIX)}
        export.write(self.config, self.ema, out, notes, towers)


def recompute_layers(model: InfDiT) -> None:
    """Let a model keep what goes into a layer only, and compute the layer again for gradients."""
    model.layer = partial(checkpoint, model.layer, use_reentrant=False)  # type: ignore[assignment]


def distil(
    out: Path, distiller: Distiller, stop_at: int, every: int, save_minutes: float, commit: str
) -> None:
    """Train until `stop_at` steps; a row of the log every `every` steps, state and model."""

    def report(losses: list[dict[str, float]]) -> None:
        names = "loss", "judge"
        found = {k: [row[k] for row in losses if k in row] for k in names}
        means = {k: round(sum(v) / len(v), 6) if v else "" for k, v in found.items()}
        add_row(out / LOG, {"step": distiller.step, **means, **distiller.measure()})

    losses: list[dict[str, float]] = []
    if not distiller.step:
        report(losses)
    for _ in steps(distiller, out / STATE, stop_at, save_minutes):
        losses.append(distiller.train_step())
        if distiller.step % every == 0:
            report(losses)
            losses = []
    distiller.export(out / MODEL, commit)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the model's file")
    parser.add_argument("out", type=Path, help="folder of the run; resumed if it holds one")
    parser.add_argument("--photos", type=Path, required=True, help="what photos.py made")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    parser.add_argument("--every", type=int, default=100, help="steps between rows of the log")
    parser.add_argument("--save-minutes", type=float, default=5, help="minutes between saves")
    parser.add_argument("--commit", help="of the trainer; that of this checkout if left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_settings(parser, Settings(""), {"degradation": DEGRADATIONS})
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings(""))})
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # vanishing gradients are many times slower on a CPU
    state = args.out / STATE
    if state.exists():
        settings = Settings(**torch.load(state, mmap=True, weights_only=True)["settings"])
        for name in CHANGEABLE:
            setattr(settings, name, getattr(args, name))
    distiller = Distiller(settings, args.photos, torch.device(args.device))
    if state.exists():
        distiller.load(state)
    commit = args.commit or export.head()
    distil(
        args.out,
        distiller,
        args.stop_at or settings.total_steps,
        args.every,
        args.save_minutes,
        commit,
    )


if __name__ == "__main__":
    main()
