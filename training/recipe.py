"""The bundled models on one GPU, by the clock: python -m training.recipe PACK OUT --seconds 510

PACK is what `training.tiles` made, with lite0.safetensors of `training.features` in it. Five
stages, each of which ends when its share of the time is over and writes averaged weights to OUT:

1. prior: the convolution network that enlarges, on reduced pictures;
2. diffusion: the transformer as the denoiser of what the prior leaves, under EDM's loss;
3. detail: its two evaluations unrolled, with features and a weak adversary, so that they suffice;
4. prior_real: the prior again, half of the pictures degraded as Real-ESRGAN's;
5. detail_real: stage 3 on such pictures.

OUT/log.jsonl has a row every few seconds. `--start` goes on from files of an OUT; `--stages` names
what to run.
"""

from __future__ import annotations

import argparse
import logging
import math
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from infdit_core.edm import RESIDUAL_DATA, RESIDUAL_MAX
from infdit_core.network.condition import Condition
from infdit_core.network.config import LR_SCALE
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import interpolate
from training import features
from training.clock import CONFIG, CROP_PX, Run, Stage
from training.data import local_variance, middle, random_origin
from training.loss import Balance, border_jumps, loss_weight
from training.muon import optimizers
from training.prior import charbonnier, enlarged, gain

SHARES = {"prior": 0.36, "diffusion": 0.29, "detail": 0.21, "prior_real": 0.05, "detail_real": 0.09}
"""Of the time; what is skipped leaves its share to the others."""
WINDOW_PX = 160
"""Part of a crop that the transformer sees, so that the prior knows what lies around it."""
SECOND_SIGMA = 0.25
"""Second noise level of the two evaluations, of the first."""
P_MEAN, P_STD = -2.0, 1.2
BORDER_WEIGHT = 0.25
EXACT = 1.5 / 127.5
FEATURES, ADVERSARY = 1.0, 0.5
"""Gradients beside that of the pixels at the detail end of the dial, before `Balance`."""
DETAIL_GAIN_DB = 0.8
"""What the detail end keeps above bicubic interpolation: about 1.2 dB are paid for detail."""

logger = logging.getLogger(__name__)


def train_prior(run: Run, name: str, deadline: float, real: bool) -> None:
    prior = run.prior.train().requires_grad_(True)
    stage = Stage(run, name, deadline, prior, every=10)
    rate = 1.5e-3 if real else 3e-3
    found = optimizers(prior.body.parameters(), prior, rate, rate / 2)

    @torch.no_grad()
    def more() -> dict:
        values = {}
        for split in ("val", "test"):
            pictures = getattr(run, split)
            for kind, lr in zip(("", "_real"), run.degraded[split], strict=True):
                with run.autocast():
                    values[split + kind] = gain(enlarged(stage.average, lr), lr, pictures)
        return values

    stage.more = more
    for _ in stage.steps(found, 0.999):
        original, lr = run.batch(64, real)
        with run.autocast():
            error = enlarged(prior, lr) - original
        # the mean of what is possible is asked for at last; before, single wild places weigh less
        loss = charbonnier(error) if stage.part < 0.7 else 10 * error.square().mean()
        loss.backward()
        stage.loss = loss.detach()
    prior.load_state_dict(stage.average.state_dict())
    prior.requires_grad_(False)


def windows(run: Run, count: int, real: bool) -> tuple[Tensor, Condition]:
    """Originals (B, 3, WINDOW, WINDOW) and their condition, whose concat is the prior's picture."""
    original, lr = run.batch(count, real)
    with torch.no_grad(), run.autocast():
        prior = enlarged(run.prior, lr)
    edge = (CROP_PX - WINDOW_PX) // 2
    cond = Condition(
        middle(prior, edge),
        middle(lr, edge // LR_SCALE),
        origin=random_origin(run.numpy, CONFIG.block_patches),
    )
    return middle(original, edge), cond


def matrices(model: InfDiT) -> list[nn.Parameter]:
    return [p for name, p in model.layers.named_parameters() if p.ndim == 2 and "embed" not in name]


def transformer_stage(run: Run, name: str, deadline: float, every: float) -> Stage:
    run.prior.requires_grad_(False)
    run.model.train()
    return Stage(run, name, deadline, run.model, every)


def noise_like(run: Run, x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=run.random, device=x.device)


def train_diffusion(run: Run, name: str, deadline: float, real: bool) -> None:
    """EDM's loss on what the prior leaves, errors weighed by place and at borders as in loss.py."""
    stage = transformer_stage(run, name, deadline, every=12)
    found = optimizers(matrices(run.model), run.model, 2e-3, 1e-3)
    val_noise = torch.randn(run.val.shape, generator=torch.Generator().manual_seed(0)).to(
        run.device
    )

    @torch.no_grad()
    def more() -> dict:
        """Gain over bicubic of D from the prior's picture; rms levels of D behind noise."""
        lr = run.degraded["val"][0]
        with run.autocast():
            cond = Condition(enlarged(stage.average.prior, lr), lr)
            first = stage.average.denoise(
                cond.concat + RESIDUAL_MAX * val_noise, RESIDUAL_MAX, cond
            )
            values = {"val_prior": gain(cond.concat, lr, run.val), "val": gain(first, lr, run.val)}
            for sigma in (0.02, 0.1, 0.3):
                denoised = stage.average.denoise(run.val + sigma * val_noise, sigma, cond)
                rms = (denoised - run.val).square().mean().sqrt().item() * 127.5
                values[f"rms_{sigma}"] = round(rms, 3)
        return values

    stage.more = more
    for _ in stage.steps(found, 0.999):
        original, cond = windows(run, 48, real)
        b = len(original)
        places = (torch.randperm(b, device=run.device) + torch.rand(b, device=run.device)) / b
        normal = torch.special.ndtri(places.clamp(1e-4, 1 - 1e-4))
        sigma = (P_MEAN + P_STD * normal).exp().clamp(0.002, 2)
        with run.autocast():
            noisy = original + sigma[:, None, None, None] * noise_like(run, original)
            error = run.model.denoise(noisy, sigma, cond).float() - original
        weight = loss_weight(sigma, RESIDUAL_DATA)[:, None, None, None]
        known = 1 / (EXACT**2 + local_variance(cond.lr))
        error = error * (weight + F.interpolate(known, scale_factor=LR_SCALE)).sqrt()
        loss = error.square().mean()
        for period in (CONFIG.patch_size, CONFIG.block_px):
            loss = loss + BORDER_WEIGHT * border_jumps(error, period).mean()
        loss.backward()
        stage.loss = loss.detach()
    run.model.load_state_dict(stage.average.state_dict())


def two_evaluations(model: InfDiT, cond: Condition, noise: Tensor, dial: Tensor) -> Tensor:
    """What Euler's method gives at sigmas (1, SECOND_SIGMA, 0) · RESIDUAL_MAX · dial, dial (B,)."""
    sigma = RESIDUAL_MAX * dial
    x = cond.concat + sigma[:, None, None, None] * noise
    first = model.denoise(x, sigma, cond)
    return model.denoise(first + SECOND_SIGMA * (x - first), SECOND_SIGMA * sigma, cond)


def train_detail(run: Run, name: str, deadline: float, real: bool) -> None:
    """Both evaluations at once: pixels at the fidelity end of the dial, looks at the other.

    What looks are worth is set by what they cost: `strength` falls while the detail end is less
    than DETAIL_GAIN_DB better than bicubic interpolation, and rises while it is more.
    """
    stage = transformer_stage(run, name, deadline, every=8)
    generator = optimizers(matrices(run.model), run.model, 6e-4, 3e-4)
    judge = features.Discriminator().to(run.device)
    if run.judge.exists():
        judge.load_state_dict(load_file(run.judge))
    judges = [torch.optim.Adam(judge.parameters(), 5e-4, betas=(0.0, 0.99))]
    balance, strength = Balance(), 1.0
    val_noise = torch.randn(run.val.shape, generator=torch.Generator().manual_seed(0)).to(
        run.device
    )
    losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def more() -> dict:
        nonlocal strength
        lr = run.degraded["val"][int(real)]
        with run.autocast():
            original = run.lite0(run.val)
            cond = Condition(enlarged(stage.average.prior, lr), lr)
            pictures = {"bicubic": interpolate(lr), "prior": cond.concat}
            for dial in (0.2, 0.5, 1.0):
                dials = torch.full((len(lr),), dial, device=run.device)
                pictures[f"{dial}"] = two_evaluations(stage.average, cond, val_noise, dials)
            values = {f"val_{k}": gain(v, lr, run.val) for k, v in pictures.items()}
            for k, v in pictures.items():
                apart = features.distance(run.lite0(v.float().clamp(-1, 1)), original).mean()
                values[f"lite0_{k}"] = round(apart.item(), 4)
        off = max(-1.0, min(1.0, values["val_1.0"] - DETAIL_GAIN_DB))
        strength = max(0.1, min(4.0, strength * math.exp(0.3 * off)))
        values |= {k: round(v.item(), 4) for k, v in losses.items()}
        return values | {"strength": round(strength, 3)}

    stage.more = more
    for _ in stage.steps(generator + judges, 0.995):
        original, cond = windows(run, 32, real)
        dial = torch.rand(len(original), generator=run.random, device=run.device) * 1.4 + 0.03
        dial = dial.clamp(max=1)  # three in ten at the detail end, and one at least
        dial[0] = 1
        with run.autocast():
            ours = two_evaluations(run.model, cond, noise_like(run, original), dial).float()
            error = ours - original
            pixel_loss = charbonnier(error, 1e-2)
            for period in (CONFIG.patch_size, CONFIG.block_px):
                pixel_loss = pixel_loss + border_jumps(error, period).mean()
            seen, aim = run.lite0(ours), run.lite0(original)
            feature_loss = features.distance(seen, aim).mean()
            judge.requires_grad_(False)
            adversary_loss = features.deceive(judge(ours, seen))
        (pixels,) = torch.autograd.grad(pixel_loss, ours, retain_graph=True)
        (looks,) = torch.autograd.grad(feature_loss, ours, retain_graph=True)
        (fooled,) = torch.autograd.grad(adversary_loss, ours, retain_graph=True)
        ramp = min(1.0, stage.part / 0.15)
        beside = FEATURES * balance("features", looks, pixels)
        beside = beside + ramp * ADVERSARY * balance("adversary", fooled, pixels)
        ours.backward(pixels + strength * dial[:, None, None, None] * beside)

        judge.requires_grad_(True)
        sharp = dial > 0.5  # what is asked to be a mean is no forgery to learn from
        with run.autocast():
            fake = judge(ours.detach()[sharp], [f.detach()[sharp] for f in seen])
            judge_loss = features.hinge(judge(original, aim), fake)
        judge_loss.backward()
        stage.loss = pixel_loss.detach()
        losses = {"features": feature_loss, "adversary": adversary_loss, "judge": judge_loss}
        losses = {k: v.detach() for k, v in losses.items()}
    run.model.load_state_dict(stage.average.state_dict())
    save_file({k: v.contiguous().cpu() for k, v in judge.state_dict().items()},
              run.out / "judge.safetensors")  # fmt: skip


@torch.no_grad()
def sheet(run: Run, real: bool) -> None:
    """Rows of bicubic, prior, dial at a half, dial at 1, original."""
    lr = torch.cat(
        [run.degraded["val"][real][1:12:2], run.degraded["test"][real][::3, :, 32:96, 32:96]]
    )
    original = torch.cat([run.val[1:12:2], run.test[::3, :, 128:384, 128:384]])
    noise = noise_like(run, original)
    with run.autocast():
        cond = Condition(enlarged(run.prior, lr), lr)
        drawn = [
            two_evaluations(run.model, cond, noise, torch.full((len(lr),), d, device=run.device))
            for d in (0.5, 1.0)
        ]
    rows = torch.cat([interpolate(lr), cond.concat, *drawn, original], dim=3).float().clamp(-1, 1)
    levels = torch.cat(list(((rows + 1) * 127.5).round().byte().cpu()), dim=1)
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    picture.save(run.out / ("sheet_real.jpg" if real else "sheet.jpg"), quality=95, subsampling=0)


STAGES: dict[str, Callable[[Run, str, float, bool], None]] = {
    "prior": train_prior,
    "diffusion": train_diffusion,
    "detail": train_detail,
    "prior_real": train_prior,
    "detail_real": train_detail,
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="in all, the start included")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--start", type=Path, nargs="*", default=[], help="files to start from, the last one wins"
    )
    parser.add_argument("--judge", type=Path, help="the adversary to start from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="for tests on a CPU")
    parser.add_argument("--most", type=int, help="pictures of each kind, for tests")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    run = Run(args)
    run.log(
        stage="start",
        tiles=len(run.train),
        parameters=sum(p.numel() for p in run.model.parameters()),
    )
    left = {name: SHARES[name] for name in STAGES if name in args.stages}
    for name in list(left):
        share = left[name] / sum(left.values())
        deadline = run.seconds() + share * (args.seconds - 4 - run.seconds())
        real = name.endswith("_real")
        try:
            STAGES[name](run, name, deadline, real)
            if name.startswith("detail"):
                sheet(run, real)
        except Exception as error:  # the stages after it are worth having all the same
            run.log(stage=name, error=traceback.format_exc()[-2000:])
            if isinstance(error, torch.OutOfMemoryError):
                run.scale /= 2
        del left[name]
    run.log(stage="end")


if __name__ == "__main__":
    main()
