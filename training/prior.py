"""A prior by itself: python -m training.prior PHOTOS OUT.safetensors --minutes 40

Crops of photographs (what photos.py made), reduced bicubic, and the correction to interpolation
that a small convolution network adds: first the L1 norm, then, unless `--l1 1`, the L2 norm, whose
minimum is the mean. With `--consistency` what counts is the picture after back-projections. Ends by
the clock; `--start` goes on from an OUT. The file fits `training.export --prior`. Photographs are
wholly in the memory of the device, so that a GPU does not wait for them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from infdit_core.network.config import LR_SCALE
from infdit_core.network.prior import Prior, interpolate
from infdit_core.pictures.prepare import nearer
from training.data import Photos, reduce_bicubic
from training.degrade_batch import reduce_realistic_batch
from training.initial import initialise_prior
from training.loss import border_jumps, gradient_similarity
from training.muon import cosine, optimizers

DECAY = 0.998
"""Of the averaged weights, per step."""
LINES = 30
"""Of the log, after each of which the file is written."""
TEST_PX = 256
SHRUNK = 1.5
"""What larger crops are reduced by: photographs are crisper then."""

logger = logging.getLogger(__name__)


def enlarged(prior: nn.Module, lr: Tensor) -> Tensor:
    """P in float32: (B, 3, h, w) -> (B, 3, 4h, 4w)."""
    correction = prior(lr.contiguous(memory_format=torch.channels_last))
    return interpolate(lr) + correction.float()


def charbonnier(error: Tensor, epsilon: float = 1e-3) -> Tensor:
    """A smooth L1 norm."""
    return (error.square() + epsilon**2).sqrt().mean() - epsilon


def psnr(ours: Tensor, original: Tensor) -> Tensor:
    """(B,) dB of pictures in [-1, 1], in 8-bit levels as they are saved."""
    levels = ((ours.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return -10 * (levels - original).square().mean(dim=(1, 2, 3)).clamp(min=1e-9).log10()


def resized(picture: Tensor, side: int) -> Tensor:
    """(B, 3, H, H) -> (B, 3, side, side), smaller."""
    smaller = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)
    return smaller.clamp(-1, 1)


def gain(ours: Tensor, lr: Tensor, original: Tensor) -> float:
    """Mean dB over bicubic interpolation."""
    return round((psnr(ours, original) - psnr(interpolate(lr), original)).mean().item(), 3)


def held_out(folder: Path) -> Tensor:
    """(N, 3, TEST_PX, TEST_PX) in [-1, 1]: the centres of photographs that are never trained on."""
    centres = []
    for path in sorted(folder.glob("*.npy")):
        photo = np.load(path, mmap_mode="r")
        top, left = ((side - TEST_PX) // 2 for side in photo.shape[:2])
        centres.append(np.array(photo[top : top + TEST_PX, left : left + TEST_PX]))
    return torch.from_numpy(np.stack(centres)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_priors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the `prior.*` weights of files of one size; a file may be named several times."""
    files = [load_file(path) for path in paths]
    names = [name for name in files[0] if name.startswith("prior.")]
    return {name: torch.stack([file[name] for file in files]).mean(dim=0) for name in names}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument(
        "--start", type=Path, nargs="+", help="what to go on from: the mean of OUTs"
    )
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--depth", type=int, default=6, help="residual pairs of convolutions")
    parser.add_argument("--crop", type=int, default=128, help="side of the crops in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3, help="of Muon; Adam takes half")
    parser.add_argument("--decay", type=float, default=0, help="of weights, times the rate, a step")
    parser.add_argument("--shrunk", type=float, default=0, help="share of larger crops, reduced")
    parser.add_argument("--real", type=float, default=0, help="share of batches degraded for real")
    parser.add_argument("--edges", type=float, default=0, help="weight of gradients that differ")
    parser.add_argument("--borders", type=float, default=0, help="weight of jumps at every 4 px")
    parser.add_argument("--l1", type=float, default=0.6, help="share of the time; L2 follows")
    parser.add_argument("--consistency", type=int, default=0, help="back-projections of a picture")
    parser.add_argument("--colours", action="store_true", help="exchange channels at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # all crops have one size
    prior = Prior(args.width, args.depth)
    if args.start:
        state = read_priors(args.start)
        prior.load_state_dict({k.removeprefix("prior."): v for k, v in state.items()})
    else:
        initialise_prior(prior)
    prior.to(args.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] - its stubs lack it alone
    larger = round(SHRUNK * args.crop) if args.shrunk else args.crop
    photos = Photos(args.photos / "train", larger, args.device)
    numpy = np.random.default_rng(args.seed)
    original = held_out(args.photos / "test").to(args.device)
    lr = reduce_bicubic(original)
    if args.real:
        lr = reduce_realistic_batch(original, np.random.default_rng(0), group=1)
    average = copy.deepcopy(prior).requires_grad_(False)
    found = optimizers(prior.body.parameters(), prior, args.rate, args.rate / 2, args.decay)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in found]
    began, step, line, part = time.monotonic(), 0, 0, 0.0

    def report() -> None:
        with torch.no_grad():
            ours = enlarged(average, lr)
            for _ in range(args.consistency):
                ours = nearer(ours, lr)
            unlike = gradient_similarity(ours, original).flatten(1).std(dim=1).mean().item()
        better = gain(ours, lr, original)
        logger.info(
            "step %d, part %.3f: %.3f dB over bicubic, deviation of gradients %.4f",
            step,
            part,
            better,
            unlike,
        )
        state = average.state_dict().items()
        save_file({f"prior.{k}": v.contiguous() for k, v in state}, args.out)

    while (part := (time.monotonic() - began) / (60 * args.minutes)) < 1:
        cosine(found, rates, step, part)
        if numpy.random() < args.shrunk:
            crops = resized(photos.batch(args.batch, numpy), args.crop)
        else:
            crops = photos.batch(args.batch, numpy, args.crop)
        if args.colours:
            crops = crops[:, numpy.permutation(3)]
        real = numpy.random() < args.real
        reduced = reduce_realistic_batch(crops, numpy, group=4) if real else reduce_bicubic(crops)
        ours = enlarged(prior, reduced)
        for _ in range(args.consistency):
            ours = nearer(ours, reduced)
        error = ours - crops
        loss = charbonnier(error) if part < args.l1 else 10 * error.square().mean()
        if args.edges:
            unlike = 1 - gradient_similarity(ours, crops).flatten(1)
            loss = loss + args.edges * (unlike.mean() + unlike.std(dim=1).mean())
        if args.borders:
            loss = loss + args.borders * border_jumps(error, LR_SCALE).mean()
        loss.backward()
        for optimizer in found:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        kept = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(prior.parameters()), 1 - kept)
        step += 1
        if part * LINES > line:
            report()
            line += 1
    report()


if __name__ == "__main__":
    main()
