"""Time one evaluation by part: python -m benchmarks.evaluation [--config small|released] ...

Writes benchmarks/results/evaluation_<device>_<config>_<size>.json with versions, device and commit,
and a bar chart beside it. With a GPU, `--config released --device cuda --dtype bf16 --size 4096`
gives the seconds and the peak memory of every schedule, and the share of the device's measured
matmul speed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.memory.planner import Workload, evaluation_bytes, evaluation_flop
from infdit_core.network import layers
from infdit_core.network.condition import Condition
from infdit_core.network.config import LR_SCALE, InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.network.run import Run

RESULTS = Path(__file__).with_name("results")
CONFIGS = {
    "small": InfDiTConfig(128, 6, 4, 4, 8, 512, vector_size=0),
    "medium": InfDiTConfig(256, 4, 4, 4, 32, 1024, vector_size=0),
    "released": InfDiTConfig(1280, 28, 16, 4, 32, 5120, vector_size=0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parts:
    """Seconds spent in parts of the network, by wrapping the functions that they are."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._stack: list[float] = []

    def wrap(self, name: str, function: Any) -> Any:
        """Count the function's own time, without that of wrapped functions inside it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            self._stack.append(0.0)
            result = function(*args, **kwargs)
            whole = self._now() - started
            self.seconds[name] += whole - self._stack.pop()
            if self._stack:
                self._stack[-1] += whole
            return result

        return timed

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def of(self, net: InfDiT):
        """Wrap the parts of a network inside the context."""
        originals = layers.BlockAttention._place, layers.block_attention, net.attend
        layers.BlockAttention._place = self.wrap("norm + rotary", originals[0])
        layers.block_attention = self.wrap("gather", originals[1])
        net.attend = self.wrap("attention", originals[2])
        modules = [(net.cross_attention, "cross attention"), (net.final, "output")]
        for layer in net.layers:
            modules += [
                (layer.get_submodule("attention.qkv"), "qkv"),
                (layer.get_submodule("attention.dense"), "dense"),
                (layer.get_submodule("mlp"), "mlp"),
            ]
        for module, name in modules:
            module.forward = self.wrap(name, module.forward)
        try:
            yield
        finally:
            layers.BlockAttention._place, layers.block_attention, net.attend = originals
            for module, _ in modules:
                del module.forward


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(config: InfDiTConfig, dtype: torch.dtype, device: torch.device) -> InfDiT:
    """A network with random weights."""
    net = InfDiT(config, dtype=dtype, device="meta").to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return net.requires_grad_(False)


def schedules_for(config: InfDiTConfig, side: int) -> list[Schedule]:
    line = Workload(config, side, side, torch.float32).grid.shorter
    found: list[Schedule] = [Full(), LayerMajor(line), BlockMajor(max(1, line // 4))]
    return [*found, LayerMajor(1), BlockMajor(1)]


def measure(
    net: InfDiT, side: int, schedule: Schedule, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Median seconds, parts and peak bytes of one evaluation of side×side pixels."""
    device = net.final.linear.weight.device
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(1, 3, side, side, device=device, generator=generator)
    lr = torch.rand(1, 3, side // LR_SCALE, side // LR_SCALE, device=device, generator=generator)
    cond = Condition(x.clamp(-1, 1), lr)
    run = Run()

    def evaluate() -> None:
        net.denoise(x, 1.0, cond, schedule, run=run)

    try:
        evaluate()
        seconds = []
        for _ in range(rounds):
            synchronize(device)
            started = time.perf_counter()
            evaluate()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        parts = Parts(device)
        with parts.of(net):
            evaluate()
        peak = peak_of(evaluate, device)
    except torch.OutOfMemoryError:
        return {"schedule": str(schedule), "out_of_memory": True}
    median = statistics.median(seconds)
    return {
        "schedule": str(schedule),
        "seconds": round(median, 4),
        "seconds_all": [round(s, 4) for s in seconds],
        "flop_per_second": evaluation_flop(net.config, side, side) / median,
        "parts": {name: round(s, 4) for name, s in parts.seconds.items()},
        "peak_bytes": peak,
        # beside it the network's result and D, float32
        "predicted_bytes": evaluation_bytes(Workload(net.config, side, side, dtype), schedule)
        + 2 * 4 * x.numel(),
    }


def peak_of(evaluate: Any, device: torch.device) -> int:
    """Bytes that an evaluation takes beyond what was there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        evaluate()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        evaluate()
    return live.peak


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        torch.matmul(a, a)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """One bar per schedule, made of the parts of the network."""
    import matplotlib.pyplot as plt

    rows = [r for r in result["schedules"] if "parts" in r]
    names = sorted({name for row in rows for name in row["parts"]})
    figure, axes = plt.subplots(figsize=(10, 1 + 0.6 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for name in names:
        widths = [row["parts"].get(name, 0.0) for row in rows]
        axes.barh([row["schedule"] for row in rows], widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"one evaluation, {result['size']}² px, {result['config']}, {result['dtype']}")
    axes.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--size", type=int, default=512, help="side of the result in pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    net = build(CONFIGS[args.config], dtype, device)
    result = {
        "command": f"python -m benchmarks.evaluation --config {args.config} --size {args.size}"
        f" --dtype {args.dtype} --device {args.device} --rounds {args.rounds}",
        "config": args.config,
        "size": args.size,
        "dtype": args.dtype,
        "environment": environment(device),
        "matmul_flop_per_second": matmul_speed(dtype, device),
        "schedules": [
            measure(net, args.size, schedule, dtype, args.rounds)
            for schedule in schedules_for(net.config, args.size)
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    stem = f"evaluation_{device.type}_{args.config}_{args.dtype}_{args.size}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / f"{stem}.png")
    for row in result["schedules"]:
        print(row)


if __name__ == "__main__":
    main()
