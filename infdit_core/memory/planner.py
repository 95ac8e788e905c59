"""How much memory an evaluation takes, and the fastest schedule that fits.

The peak of one chunk is not a formula but a measurement: the network's own code runs on the meta
device, where tensors have shapes and no memory, and the bytes that would be alive are counted. What
a schedule keeps between chunks (tokens, frontiers) follows from section 3 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..blocks.grid import Chunk, Frontier, Grid
from ..blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from ..errors import InfDiTError
from ..network.condition import Condition
from ..network.config import LR_SCALE, InfDiTConfig
from ..network.model import Evaluation, InfDiT
from ..network.shapes import parameter_shapes
from ..network.streaming import resident_parameters
from .live_bytes import LiveBytes

SAMPLER_PICTURES = 8
"""Float32 pictures of (3, H, W) that a solver keeps beside the network's own result: the picture,
its condition, the noise, the denoised picture, two derivatives, the next picture, one temporary."""

_BEST_CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Tokens per chunk that run fastest. The CPU's is measured (benchmarks/), the GPU's a guess."""
_SMALL_CHUNK_COST = 0.25
"""Measured on a CPU: every halving of the chunk below the best size costs a quarter more time."""
_LARGE_CHUNK_COST = 0.07
"""Measured on a CPU: every doubling above it, because of its caches."""
_LR_ANEW_COST = 0.01
_HOST_TOKENS_COST = 0.2
_HOST_PICTURES_COST = 0.1
_HOST_WEIGHTS_COST = 0.1
"""Guesses: moving tokens, pictures or weights between device and host, beside the computation."""


class PlanError(InfDiTError):
    """What was asked for does not fit the memory."""


@dataclass(frozen=True)
class Plan:
    """A schedule and what it is expected to take."""

    schedule: Schedule
    peak_bytes: int
    """On the device of the model, weights included if asked for."""
    host_bytes: int
    """Of tokens and pictures that wait in the host's memory."""
    cost: float
    """Expected time relative to the best schedule on unlimited memory."""

    def __str__(self) -> str:
        host = f", {gigabytes(self.host_bytes)} on the host" if self.host_bytes else ""
        return f"{describe(self.schedule)}, about {gigabytes(self.peak_bytes)}{host}"


def plan(
    config: InfDiTConfig,
    height: int,
    width: int,
    dtype: torch.dtype,
    memory_bytes: float,
    *,
    device: str = "cuda",
    batch: int = 1,
    weights: bool = True,
) -> Schedule:
    """The fastest schedule whose peak fits.

    Args:
        height, width: of the result in pixels; padded to whole blocks here.
        dtype: of the computation.
        memory_bytes: what may be taken on the device.
        device: "cpu" or "cuda", which have different best chunks.
        weights: whether the weights must fit into that memory too.

    Raises:
        PlanError: none fits.
    """
    found = plans(config, height, width, dtype, device=device, batch=batch, weights=weights)
    for candidate in found:
        if candidate.peak_bytes <= memory_bytes:
            return candidate.schedule
    smallest = min(found, key=lambda p: p.peak_bytes)
    raise PlanError(
        f"{width}×{height} px needs at least {gigabytes(smallest.peak_bytes)} with this model"
        f" ({describe(smallest.schedule)}), got {gigabytes(memory_bytes)}"
    )


def plans(
    config: InfDiTConfig,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
    batch: int = 1,
    weights: bool = True,
    pictures: bool = True,
    residual: bool = False,
) -> list[Plan]:
    """All schedules worth considering, the fastest first; arguments as for `peak_bytes`."""
    grid = grid_of(config, height, width)
    found = []
    for schedule in _candidates(grid, device, weights):
        chunk = _largest_chunk(schedule, grid)
        cost = _cost(chunk.rows * chunk.columns * config.block_tokens * batch, device)
        peak = peak_bytes(
            config,
            height,
            width,
            schedule,
            dtype,
            batch=batch,
            weights=weights,
            pictures=pictures,
            residual=residual,
        )
        host_bytes = 0
        if isinstance(schedule, LayerMajor):
            if not schedule.keep_lr:
                cost += _LR_ANEW_COST
            if schedule.tokens_on_host:
                cost += _HOST_TOKENS_COST
                host_bytes += (1 + residual) * _blocks(grid) * _block_bytes(config, dtype, batch)
            if schedule.pictures_device is not None:
                cost += _HOST_PICTURES_COST
                host_bytes += _picture_bytes(config, grid, batch)
            if schedule.stream_weights:
                cost += _HOST_WEIGHTS_COST
                host_bytes += weight_bytes(config, dtype) - streamed_weight_bytes(config, dtype)
        found.append(Plan(schedule, peak, host_bytes, cost))
    return sorted(found, key=lambda p: (round(p.cost, 2), p.peak_bytes))


def peak_bytes(
    config: InfDiTConfig,
    height: int,
    width: int,
    schedule: Schedule,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    weights: bool = True,
    pictures: bool = True,
    residual: bool = False,
) -> int:
    """Bytes alive on the device at the peak of sampling a picture of height×width pixels.

    Args:
        weights, pictures: whether the network's weights and the solver's pictures count.
        residual: whether a `ResidualCache` is used.
    """
    grid = grid_of(config, height, width)
    total = evaluation_bytes(config, grid, schedule, dtype, batch)
    total += _lr_bytes(config, grid, dtype, batch, kept=schedule.keep_lr)
    if pictures and schedule.pictures_device is None:
        total += _picture_bytes(config, grid, batch)
    if residual and not schedule.tokens_on_host:
        total += _blocks(grid) * _block_bytes(config, dtype, batch)
    if weights:
        streamed = isinstance(schedule, LayerMajor) and schedule.stream_weights
        total += (streamed_weight_bytes if streamed else weight_bytes)(config, dtype)
    return total


def evaluation_bytes(
    config: InfDiTConfig, grid: Grid, schedule: Schedule, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes of tokens, frontiers and the chunk at work: what the schedule decides about."""
    chunk = _largest_chunk(schedule, grid)
    at_work = _chunk_bytes(config, chunk.rows, chunk.columns, dtype, batch, schedule.keep_lr)
    if isinstance(schedule, BlockMajor):
        return at_work + config.num_layers * _frontier_bytes(config, grid, chunk, dtype, batch)
    if isinstance(schedule, LayerMajor):
        at_work += _frontier_bytes(config, grid, chunk, dtype, batch)
        blocks = chunk.rows * chunk.columns
        waiting = _blocks(grid) - blocks
        if schedule.tokens_on_host:  # two slots for what comes, one of them counted; what leaves
            waiting = min(2 * blocks, waiting)
        at_work += waiting * _block_bytes(config, dtype, batch)
    return at_work


def weight_bytes(config: InfDiTConfig, dtype: torch.dtype) -> int:
    """Bytes of the network's parameters."""
    return sum(math.prod(s) for s in parameter_shapes(config).values()) * dtype.itemsize


def streamed_weight_bytes(config: InfDiTConfig, dtype: torch.dtype) -> int:
    """Bytes of parameters on the device where layers come one at a time."""
    net = InfDiT(config, dtype=dtype, device="meta")
    return sum(p.nbytes for p in resident_parameters(net)) + sum(
        p.nbytes for p in net.layers[0].parameters()
    )


def evaluation_flop(config: InfDiTConfig, height: int, width: int) -> float:
    """Floating point operations of one evaluation, multiply and add counted as two."""
    grid = grid_of(config, height, width)
    tokens = grid.rows * grid.columns * config.block_tokens
    h, t = config.hidden_size, config.block_tokens
    linear = 2 * (4 * h * h + 2 * h * config.mlp_size)
    attention = 2 * 2 * 4 * t * h
    cross = 2 * 2 * h * h + 2 * 2 * config.lr_window**2 * h
    return float(tokens) * (config.num_layers * (linear + attention) + cross)


def describe(schedule: Schedule) -> str:
    """A schedule in words."""
    match schedule:
        case BlockMajor(blocks=n):
            return f"block by block, {n}×{n} at a time"
        case LayerMajor(blocks_per_chunk=m):
            where = ", tokens on the host" if schedule.tokens_on_host else ""
            where += "" if schedule.keep_lr else ", LR keys made anew"
            where += ", pictures on the host" if schedule.pictures_device is not None else ""
            where += ", weights on the host" if schedule.stream_weights else ""
            return f"layer by layer, {m} block{'s' * (m > 1)} at a time{where}"
    return "the whole picture at once"


def grid_of(config: InfDiTConfig, height: int, width: int) -> Grid:
    """The block grid of a picture in pixels, padded to whole blocks."""
    return Grid(math.ceil(height / config.block_px), math.ceil(width / config.block_px))


def _candidates(grid: Grid, device: str, weights: bool) -> Iterator[Schedule]:
    longer, shorter = max(grid), grid.shorter
    yield Full()
    sizes = [lines * shorter for lines in _halvings(longer)]
    sizes += [blocks for blocks in _halvings(shorter) if blocks < shorter]
    for size in sizes:
        yield LayerMajor(size)
        yield LayerMajor(size, keep_lr=False)
        if device != "cpu":
            yield LayerMajor(size, tokens_on_host=True)
            lean = LayerMajor(size, tokens_on_host=True, keep_lr=False)
            yield lean
            lean = replace(lean, pictures_device="cpu")
            yield lean
            if weights:
                yield replace(lean, stream_weights=True)
    for blocks in _halvings(shorter):
        yield BlockMajor(blocks)


def _halvings(n: int) -> Iterator[int]:
    while n >= 1:
        yield n
        n //= 2


def _largest_chunk(schedule: Schedule, grid: Grid) -> Chunk:
    match schedule:
        case BlockMajor(blocks=n):
            return next(grid.chunks(n, n))
        case LayerMajor():
            return schedule.chunks(grid)[0]
    return grid.whole


def _cost(tokens: int, device: str) -> float:
    doublings = math.log2(tokens / _BEST_CHUNK_TOKENS.get(device, _BEST_CHUNK_TOKENS["cuda"]))
    return 1 + (_LARGE_CHUNK_COST * doublings if doublings > 0 else -_SMALL_CHUNK_COST * doublings)


def _block_bytes(config: InfDiTConfig, dtype: torch.dtype, batch: int) -> int:
    return batch * config.block_tokens * config.hidden_size * dtype.itemsize


def _picture_bytes(config: InfDiTConfig, grid: Grid, batch: int) -> int:
    """The solver's pictures and the network's result, float32."""
    return (1 + SAMPLER_PICTURES) * batch * 3 * _blocks(grid) * config.block_px**2 * 4


def _blocks(grid: Grid) -> int:
    return grid.rows * grid.columns


def _frontier_bytes(
    config: InfDiTConfig, grid: Grid, chunk: Chunk, dtype: torch.dtype, batch: int
) -> int:
    """Keys and values of the line across the shorter side, the last chunk's end and corner."""
    if grid.by_columns:
        chunk = chunk.transposed
    blocks = grid.shorter if chunk.rows < max(grid) else 0
    if chunk.columns < grid.shorter:
        blocks += chunk.rows + 1
    return 2 * blocks * _block_bytes(config, dtype, batch)


def _lr_bytes(
    config: InfDiTConfig, grid: Grid, dtype: torch.dtype, batch: int, *, kept: bool
) -> int:
    """The LR picture, and its keys and values with their border if they are kept."""
    total = batch * 3 * _blocks(grid) * (config.block_px // LR_SCALE) ** 2 * 4
    if kept:
        tokens = math.prod((n + 2) * config.lr_block for n in grid)
        total += batch * 2 * tokens * config.hidden_size * dtype.itemsize
    return total


@lru_cache(maxsize=256)
def _chunk_bytes(
    config: InfDiTConfig, rows: int, columns: int, dtype: torch.dtype, batch: int, keep_lr: bool
) -> int:
    """Peak of a chunk's own tensors through embedding, layers 0 and 1 and output."""
    config = replace(config, num_layers=min(2, config.num_layers))
    net = InfDiT(config, dtype=dtype, device="meta", attend=_attend_without_memory)
    net.requires_grad_(False)
    h, w = rows * config.block_px, columns * config.block_px
    x, sigma = torch.empty(batch, 3, h, w, device="meta"), torch.ones(batch)
    vector = torch.empty(batch, config.vector_size, device="meta") if config.vector_size else None
    cond = Condition(x, x.new_empty(batch, 3, h // LR_SCALE, w // LR_SCALE), vector)
    lr_kv = net.lr_keys_values(cond.lr.to(dtype)) if keep_lr else None
    evaluation = Evaluation(net, x, sigma.to("meta"), cond, lr_kv, dtype)
    chunk = evaluation.grid.whole
    with LiveBytes() as live:
        tokens = evaluation.embed(chunk)
        for n in range(config.num_layers):
            tokens = evaluation.layer(n, tokens, chunk, Frontier(evaluation.grid))
        evaluation.write(tokens, chunk)
    return live.peak


def _attend_without_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention kernels keep nothing of the size of the scores."""
    return torch.empty_like(q)


def gigabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
