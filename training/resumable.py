"""Runs that go on after any stop: what a state file holds, and the loop that writes it.

And what the command lines of such runs share: settings as arguments, rows of a log.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from infdit_core.dimr.model import DiMR
from infdit_core.network.model import InfDiT
from infdit_core.whole_files import whole_file

STATE = "state.pt"
LOG = "log.csv"

logger = logging.getLogger(__name__)

Network = TypeVar("Network", InfDiT, DiMR)


class Resumable(Generic[Network]):
    """A model at training: averaged weights, optimizers, generators and the number of the step.

    Args:
        settings: a dataclass, kept in the state file.
        model: the network; its parameters are trained where they ask for gradients.
        optimizers: of these parameters.
        seed: of `numpy` and `torch`, which all that is random is drawn from.
    """

    def __init__(
        self, settings: Any, model: Network, optimizers: list[torch.optim.Optimizer], seed: int
    ) -> None:
        self.settings, self.model, self.optimizers = settings, model, optimizers
        self.config = model.config
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.numpy = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.step = 0

    def update(self, rate: float, grad_clip: float, ema_decay: float) -> None:
        """Let the optimizers take a step along the gradients, and average the weights."""
        nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.ema[name].lerp_(value, 1 - decay)

    def ema_model(self) -> Network:
        """A network of the averaged weights, which it shares."""
        model = type(self.model)(self.config, device="meta")
        model.load_state_dict(self.ema, assign=True)
        return model.requires_grad_(False).eval()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "settings": asdict(self.settings),
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "numpy": json.dumps(self.numpy.bit_generator.state),
            "torch": self.torch.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.numpy.bit_generator.state = json.loads(state["numpy"])
        self.torch.set_state(state["torch"].cpu())

    def save(self, path: Path) -> None:
        """Write the whole state: a run that is killed here keeps the last one."""
        with whole_file(path) as file:
            torch.save(self.state(), file)

    def load(self, path: Path) -> None:
        device = next(self.model.parameters()).device
        self.restore(torch.load(path, map_location=device, weights_only=True))


def steps(run: Resumable, path: Path, stop_at: int, save_minutes: float) -> Iterator[int]:
    """The steps until `stop_at`, SIGTERM or SIGINT, each to be taken by who iterates.

    The state goes to `path` every `save_minutes` and at the end.
    """
    stopping = False

    def stop(signum, frame):
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    saved = time.monotonic()
    while run.step < stop_at and not stopping:
        yield run.step
        if time.monotonic() - saved > 60 * save_minutes:
            run.save(path)
            saved = time.monotonic()
    run.save(path)
    logger.info("stopped at step %d", run.step)


def add_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a .csv file, whose first line names the columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    logger.info("%s", row)


def add_settings(
    parser: argparse.ArgumentParser, settings: Any, choices: Mapping[str, tuple[str, ...]]
) -> None:
    """An argument for each value of a dataclass that the parser does not have yet."""
    there = {action.dest for action in parser._actions}
    for name, value in asdict(settings).items():
        flag = f"--{name.replace('_', '-')}"
        if name in there:
            continue
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value, choices=choices.get(name))
