"""Count what a layer moves outside matmul and attention: python -m benchmarks.traffic

One evaluation of the released width on the meta device, with three layers and with two: the
difference is one layer. Counts the launches in a chunk and the bytes read and written for a token,
by part and operation, where nothing is cached. Of the attention what it writes is counted, as
partial attentions write more. First plainly, then with the ways of a GPU one after the other (see
`infdit_core.network.fast`). Writes benchmarks/results/traffic.json.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infdit_core.blocks.grid import Grid
from infdit_core.blocks.schedules import Schedule
from infdit_core.network import fast
from infdit_core.network.condition import Condition
from infdit_core.network.config import DTYPES, LR_SCALE
from infdit_core.network.model import InfDiT

from . import common
from .common import CONFIGS, RESULTS

CONFIG = CONFIGS["released"]
NOT_COUNTED = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution"}
NOT_COUNTED |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAYS = "norm", "place", "join", "gelu"
"""Those of `fast.DEVICES` that change what is moved, each with the ones before it."""
OVERWRITING = {"copy_", "fill_", "zero_"}
"""In place, without reading what was there."""


class Traffic(TorchDispatchMode):
    """Counts launches and bytes by part of the network and operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.part = ""

    def now_in(self, part: str) -> None:
        self.part = part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        part, name = self.part, func.overloadpacket.__name__
        read, written = _tensors((args, kwargs)), _tensors(out)
        if name in NOT_COUNTED or _is_view(func, read, written):
            return out
        if name == "native_layer_norm" and not read[0].is_contiguous():  # it makes a copy first
            self.launches[part, "contiguous"] += 1
            self.bytes[part, "contiguous"] += 2 * _bytes(read[0])
        self.launches[part, name] += 1
        # our kernels are given what they only write, so it is in `read`
        moved = written + (read[1:] if name in OVERWRITING else read)
        if part == "attention":
            moved = written
        self.bytes[part, name] += sum(map(_bytes, moved))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    there = {id(tensor.untyped_storage()) for tensor in read}
    return not func._schema.is_mutable and all(id(t.untyped_storage()) in there for t in written)


def _bytes(tensor: Tensor) -> int:
    """Of memory that is touched: what is expanded is there once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(length for length, stride in sides if stride) * tensor.itemsize


class Attend:
    """Attention that only makes its result."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def for_parts(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self._part if fast.uses("join", q) else None

    def _part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)


def count(layers: int, side: int, dtype: torch.dtype, schedule: Schedule) -> Traffic:
    """One evaluation of side×side px by that many layers."""
    net = InfDiT(replace(CONFIG, num_layers=layers), dtype=dtype, device="meta", attend=Attend())
    x = torch.empty(1, 3, side, side, device="meta")
    cond = Condition(x, x[..., ::LR_SCALE, ::LR_SCALE])
    traffic = Traffic()
    with torch.no_grad(), common.parts(net, traffic.now_in), traffic:
        net.denoise(x, 1.0, cond, schedule)
    return traffic


def layer(args: Namespace, schedule: Schedule) -> list[dict[str, Any]]:
    """What one layer adds, by part and operation, the most bytes first; the last row is the sum."""
    blocks, tokens = args.size // CONFIG.block_px, (args.size // CONFIG.patch_size) ** 2
    more, fewer = (count(n, args.size, DTYPES[args.dtype], schedule) for n in (3, 2))
    launches, moved = more.launches - fewer.launches, more.bytes - fewer.bytes
    rows = [(*key, launches[key], moved[key]) for key in sorted(launches, key=lambda k: -moved[k])]
    rows.append(("all", "", launches.total(), moved.total()))
    chunks = len(list(schedule.chunks(Grid(blocks, blocks))))
    return [
        {
            "part": part,
            "operation": operation,
            "launches": round(calls / chunks, 2),
            "bytes": round(size / tokens),
        }
        for part, operation, calls, size in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(
        "traffic", __doc__, size={"default": 4096}, dtype={"default": "bf16"}, schedules={}
    )
    args = common.parse(parser, argv)
    result = common.header(args, "size", "dtype", schedules={})
    for schedule in args.schedules or [common.schedule(f"layers={args.size // CONFIG.block_px}")]:
        tables = result["schedules"][str(schedule)] = {}
        fast.DEVICES.update({way: set() for way in fast.DEVICES})
        for way in ("plain", *WAYS):
            if way in fast.DEVICES:
                fast.DEVICES[way] = {"cuda"}
            with fast.counted_as("cuda"):
                rows = layer(args, schedule)
            table = tables[way if way == "plain" else f"and {way}"] = rows
            print(f"\n{schedule}, {way}: launches a chunk, bytes a token")
            for row in table:
                print("{part:24} {operation:20} {launches:6} {bytes:8}".format(**row))
    common.save(RESULTS / "traffic.json", result)


if __name__ == "__main__":
    main()
