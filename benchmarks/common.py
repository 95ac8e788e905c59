"""The library of the benchmarks: arguments, results, clocks, bytes, the parts of the network.

Scripts import this and the other `common_*` modules, never each other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.network.config import DTYPES, RELEASED, InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.whole_files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUNDLED_MODEL = BUNDLED_FOLDER / "infdit_small.safetensors"
CONFIGS = {
    "small": InfDiTConfig(128, 6, 4, 4, 8, 512, vector_size=0),
    "medium": InfDiTConfig(256, 4, 4, 4, 32, 1024, vector_size=0),
    "released": replace(RELEASED, vector_size=0),
}


def schedule(text: str) -> Schedule:
    """`full`, `layers=N` or `blocks=N`, these with `,host`, as an order of computation."""
    if text == "full":
        return Full()
    if not (found := re.fullmatch(r"(layers|blocks)=(\d+)(,host)?", text)):
        raise argparse.ArgumentTypeError(f"expected full, layers=N or blocks=N, got {text!r}")
    kind = LayerMajor if found[1] == "layers" else BlockMajor
    return kind(int(found[2]), bool(found[3]))


def schedules_for(config: InfDiTConfig, side: int) -> list[Schedule]:
    """The orders worth comparing for side×side px, from all at once to a block at a time."""
    line = side // config.block_px
    found: list[Schedule] = [Full(), LayerMajor(line), BlockMajor(max(1, line // 4))]
    return [*found, LayerMajor(1), BlockMajor(1)]


_OPTIONS: dict[str, dict[str, Any]] = {
    "photos": {"type": Path, "required": True, "help": "what training.photos made"},
    "model": {"type": Path, "default": BUNDLED_MODEL},
    "config": {"choices": CONFIGS, "help": "size of a network with random weights"},
    "size": {"type": int, "help": "side of the result in pixels"},
    "schedules": {"type": schedule, "nargs": "+", "help": "full, layers=N[,host], blocks=N[,host]"},
    "device": {"type": torch.device, "default": "cpu"},
    "dtype": {"choices": DTYPES, "default": "fp32"},
    "rounds": {"type": int, "default": 3, "help": "how often everything is timed"},
    "comfyui": {
        "type": Path,
        "default": os.environ.get("INFDIT_COMFYUI"),
        "help": "source folder of a ComfyUI (default: INFDIT_COMFYUI)",
    },
}


def arguments(name: str, text: str | None, *options: str, **changed: Any) -> ArgumentParser:
    """The parser of `benchmarks.NAME` with shared options, changed where a benchmark differs."""
    parser = ArgumentParser(f"python -m benchmarks.{name}", description=text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for option in (*options, *changed):
        parser.add_argument(f"--{option}", **_OPTIONS[option] | changed.get(option, {}))
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; `command` among them is the command line as results show it."""
    args = parser.parse_args(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):  # where this machine keeps things means nothing elsewhere
        if Path(word).exists() and not Path(word).resolve().is_relative_to(ROOT):
            words[i] = words[i - 1].lstrip("-").upper() if i else "FILE"
    args.command = f"{parser.prog} {shlex.join(words)}".strip()
    return args


def header(args: argparse.Namespace, *names: str, **more: Any) -> dict[str, Any]:
    """The head of a result: the command, the arguments of these names, what it depends on."""
    device = getattr(args, "device", torch.device("cpu"))
    said = {name: getattr(args, name) for name in names}
    return {"command": args.command, **said, **more, "environment": environment(device)}


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit; INFDIT_COMMIT names it where the checkout came without git."""
    commit = os.environ.get("INFDIT_COMMIT", "")
    if not commit and shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def save(path: Path, result: Any) -> None:
    """Write a result, replaced as a whole, so that a kill leaves the rows that are finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")


@contextmanager
def chart(path: Path, **labels: Any) -> Iterator[Any]:
    """Matplotlib axes with these properties, written to `path` at the end."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.set(**labels)
    axes.grid(alpha=0.3)
    yield axes
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def build(config: InfDiTConfig, dtype: torch.dtype, device: torch.device) -> InfDiT:
    """A network with random weights."""
    net = InfDiT(config, dtype=dtype, device="meta").to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return net.requires_grad_(False)


def add_comfyui(folder: Path | None, device: torch.device) -> None:
    """Make `import comfy` work, on this device."""
    if folder is None:
        raise SystemExit("expected the folder of a ComfyUI in --comfyui or INFDIT_COMFYUI")
    # In front, so that `import nodes` finds ComfyUI's nodes.py and not our folder of that name.
    sys.path.insert(0, str(folder))
    importlib.import_module("comfy.cli_args").args.cpu = device.type == "cpu"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call in every round. They take turns, as a machine's speed changes."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            measured[name].append(seconds(run, device))
    return measured


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of one call's seconds over another's."""
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 4)


def errors(picture: Tensor, other: Tensor) -> dict[str, float]:
    """The largest difference of two pictures, and its root mean square."""
    difference = (picture.float() - other.float()).abs()
    rms = difference.double().square().mean().sqrt()
    return {"max": float(f"{difference.max():.3g}"), "rms": float(f"{rms:.3g}")}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call takes beyond what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        run()
    return live.peak


_PARTS = {
    "patch_embed": "embedding",
    "time_embed": "embedding",
    "modulations": "embedding",
    "cross_attention": "cross attention",
    "attention": "norm, rotary, gather",
    "attention.qkv": "qkv",
    "attention.qk_norm": "qk-norm",
    "attention.dense": "dense",
    "mlp": "mlp",
    "final": "output",
}
"""Parts by the names of modules, those of a layer without its number."""


@contextmanager
def parts(net: InfDiT, now_in: Callable[[str], None]) -> Iterator[None]:
    """Call `now_in(part)` where a part of the network begins, and with what is around it after."""
    around = ["other"]
    attend = net.attend

    def begin(part: str) -> None:
        around.append(part)
        now_in(part)

    def end() -> None:
        around.pop()
        now_in(around[-1])

    def as_part(run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            begin("attention")
            out = run(*args)
            end()
            return out

        return watched

    class Watched:
        """The attention, to all keys or to a part of them."""

        __call__ = staticmethod(as_part(attend))

        @staticmethod
        def for_parts(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Any] | None:
            for_parts = getattr(attend, "for_parts", None)
            part = for_parts and for_parts(q, k, v)
            return part and as_part(part)

    hooks = []
    for name, module in net.named_modules():
        if part := _PARTS.get(re.sub(r"^layers\.\d+\.", "", name)):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: begin(part)))
            hooks.append(module.register_forward_hook(lambda *_: end()))
    net.attend = Watched()
    now_in("other")
    try:
        yield
    finally:
        now_in("other")
        net.attend = attend
        for hook in hooks:
            hook.remove()
