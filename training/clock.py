"""Training by the clock: pictures on the GPU, and stages that end when their time is over."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import Prior
from training import features, tiles
from training.data import reduce_bicubic
from training.degrade_batch import reduce_realistic_batch
from training.initial import initialise
from training.muon import cosine

CONFIG = InfDiTConfig(160, 6, 5, 4, 8, 640, vector_size=0, prior_width=64, prior_depth=12)
CROP_PX = 192

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


class Run:
    """What all stages share: pictures, clock, log, and the network.

    Args:
        args: of the command line of `recipe`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.began = time.monotonic()
        self.device, self.out, self.scale = torch.device(args.device), args.out, args.batch_scale
        self.out.mkdir(parents=True, exist_ok=True)
        self.train = tiles.read(args.pack / "TRAIN.bin", self.device, args.most)
        self.val = self._pictures(tiles.read(args.pack / "VAL.bin", self.device, args.most))
        self.test = self._pictures(tiles.read(args.pack / "TEST.bin", self.device, args.most))
        self.lite0 = features.read(args.pack / "lite0.safetensors").to(self.device)
        self.random = torch.Generator(self.device).manual_seed(args.seed)
        self.numpy = np.random.default_rng(args.seed)
        torch.manual_seed(args.seed)
        self.model = initialise(InfDiT(CONFIG))
        for path in args.start:
            unknown = self.model.load_state_dict(load_file(path), strict=False).unexpected_keys
            if unknown:
                raise SystemExit(f"{path}: expected weights of this network; got {unknown[0]}")
        self.model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] - its stubs lack memory_format alone
        self.judge = args.judge or self.out / "judge.safetensors"
        """File of the adversary that the stages share."""
        self.degraded = {
            name: (reduce_bicubic(pictures), self._realistic(pictures))
            for name, pictures in (("val", self.val), ("test", self.test))
        }

    def _pictures(self, levels: Tensor) -> Tensor:
        return levels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _realistic(self, pictures: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return reduce_realistic_batch(pictures, np.random.default_rng(5), group=1)

    def batch(self, count: int, real: bool) -> tuple[Tensor, Tensor]:
        """Originals (count, 3, CROP, CROP) and LR pictures, half of them degraded if `real`."""
        count = max(2, round(count * self.scale))
        side = CROP_PX * 4 // 3 if self.numpy.random() < 0.3 else CROP_PX
        original = tiles.crops(self.train, count, side, self.random)
        if side != CROP_PX:
            original = F.interpolate(
                original, (CROP_PX, CROP_PX), mode="bicubic", antialias=True
            ).clamp(-1, 1)
        half = count // 2 if real else count
        lr = reduce_bicubic(original[:half])
        if real:
            lr = torch.cat([lr, reduce_realistic_batch(original[half:], self.numpy)])
        return original, lr

    @property
    def prior(self) -> Prior:
        return cast("Prior", self.model.prior)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def log(self, **row: object) -> None:
        row = {"seconds": round(self.seconds(), 1), **row}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s", row)


class Stage(Generic[M]):
    """A loop until a deadline: rates by the time passed, averaged weights, a log, files."""

    def __init__(self, run: Run, name: str, deadline: float, trained: M, every: float) -> None:
        self.run, self.name, self.deadline, self.every = run, name, deadline, every
        self.start, self.step, self.part = run.seconds(), 0, 0.0
        self.trained = trained
        self.average = copy.deepcopy(trained).requires_grad_(False).eval()
        self._pairs: tuple[list[Tensor], list[Tensor]] = (
            list(self.average.parameters()),
            list(trained.parameters()),
        )

    def steps(self, found: list[torch.optim.Optimizer], decay: float) -> Iterator[int]:
        """Steps until the deadline. The body computes gradients; weights change when it is done."""
        rates = [[group["lr"] for group in o.param_groups] for o in found]
        last_log = last_save = self.run.seconds()
        while True:
            self.part = (self.run.seconds() - self.start) / max(1e-6, self.deadline - self.start)
            if self.part >= 1 and self.step:
                break
            cosine(found, rates, self.step, self.part)
            yield self.step
            for optimizer in found:
                parameters = [p for g in optimizer.param_groups for p in g["params"]]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            kept = min(decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(*self._pairs, 1 - kept)
            self.step += 1
            now = self.run.seconds()
            if now - last_log > self.every:
                self.report()
                last_log = self.run.seconds()
                if now - last_save > 60:
                    self.save()
                    last_save = self.run.seconds()
        self.report()
        self.save()

    loss: Tensor | float = 0.0
    more: Callable[[], dict] = staticmethod(dict)

    def report(self) -> None:
        loss = round(float(self.loss), 5)
        self.run.log(
            stage=self.name, step=self.step, part=round(self.part, 3), loss=loss, **self.more()
        )

    def save(self) -> None:
        prefix = "prior." if self.name.startswith("prior") else ""
        state = {prefix + k: v.contiguous().cpu() for k, v in self.average.state_dict().items()}
        save_file(state, self.run.out / f"{self.name}.safetensors")
        if not prefix:  # it holds its prior
            prior = "prior_real" if self.name.endswith("_real") else "prior"
            (self.run.out / f"{prior}.safetensors").unlink(missing_ok=True)
