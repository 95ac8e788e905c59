"""How much memory an evaluation takes, and the fastest schedule that fits.

The peak of one chunk is not a formula but a measurement: the network's own code runs on the meta
device, where tensors have shapes and no memory, and the bytes that would be alive are counted. What
is kept between chunks (tokens, frontiers) is the schedule's own word, its `Residency`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..blocks.grid import Chunk, Grid
from ..blocks.schedules import LayerMajor, Schedule, candidates
from ..network import fast
from ..network.condition import Condition
from ..network.config import LR_SCALE, InfDiTConfig
from ..network.model import InfDiT
from ..network.prior import BAND_PX, Prior
from ..network.run import Run
from ..network.shapes import parameter_shapes
from ..network.streaming import SLOTS, resident_parameters
from .host import SAMPLER_PICTURES, PlanError, gigabytes, waiting_bytes
from .live_bytes import LiveBytes

_BEST_CHUNK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens per chunk that run fastest. The CPU's is measured (benchmarks/README.md), the GPU's a
guess."""
_SMALL_CHUNK_COST = 0.25
"""Measured on a CPU: every halving of the chunk below the best size costs a quarter more time."""
_LARGE_CHUNK_COST = 0.07
"""Measured on a CPU: every doubling above it, because of its caches."""
_LR_ANEW_COST = 0.01
_HOST_TOKENS_COST = 0.2
"""Guess: tokens that go to the host and come back beside the computation, in every layer."""
_HOST_PICTURES_COST = 0.1
_HOST_WEIGHTS_COST = 0.1
"""Guesses: moving pictures between device and host; computing the modulations there."""
_FAST_COST = 1.1
"""A plan is fast if it takes at most this much more time than the fastest that fits."""
_TOKEN_TENSORS, _PRIOR_TENSORS = 100, 10
"""More tensors than are ever alive, of the tokens of a chunk and of the features of a prior."""
_LINES_BETWEEN = 5
"""Of a strip: what it has received, one that comes, what it gathers, and two on their way out."""
_SMALL_SHARE = 0.25
"""Of the memory: what such a bound may take."""
_UNIFIED = ("cpu", "mps")
"""Devices whose memory is the host's."""


@dataclass(frozen=True)
class Workload:
    """The sampling of a picture, as far as its memory depends on it."""

    config: InfDiTConfig
    height: int
    width: int
    """Of the result in pixels; padded to whole blocks here."""
    dtype: torch.dtype
    """Of the computation."""
    batch: int = 1
    device: str = "cuda"
    """Type of the network's device: each has its own best chunk, and a CPU is its own host."""
    weights: bool = True
    """Whether the network's weights must fit into the same memory, or may wait in the host's. Not
    where another program keeps them, and the solver's pictures."""
    pictures: int = SAMPLER_PICTURES
    """How many of a solver must, with the condition and the network's result."""
    scratch: bool = False
    """Whether they are in files, which take neither memory, and so is the LR picture."""
    residual: bool = False
    """Whether a `ResidualCache` is used."""
    fused: bool = False
    """Whether the ways of a GPU compute the layers (`InfDiT.fused`), which take less."""
    strip_of_columns: bool | None = None
    """Of a strip of a picture: whether it is one of columns; None for a whole picture."""

    @property
    def grid(self) -> Grid:
        side = self.config.block_px
        rows, columns = math.ceil(self.height / side), math.ceil(self.width / side)
        return Grid(rows, columns, self.strip_of_columns)

    @property
    def best_blocks(self) -> float:
        """Blocks of a chunk that run fastest."""
        tokens = _BEST_CHUNK_TOKENS.get(self.device, _BEST_CHUNK_TOKENS["cuda"])
        return tokens / (self.batch * self.config.block_tokens)

    @property
    def block_bytes(self) -> int:
        """Of the tokens of one block."""
        return self.batch * self.config.block_tokens * self.config.hidden_size * self.dtype.itemsize

    @property
    def picture_bytes(self) -> int:
        """Of the solver's pictures in memory, float32."""
        pixels = self.grid.blocks * self.config.block_px**2
        return 0 if self.scratch else self.pictures * self.batch * 3 * pixels * 4


@dataclass(frozen=True)
class Plan:
    """A schedule and what it is expected to take."""

    schedule: Schedule
    peak_bytes: int
    """On the device of the model, with what the workload counts."""
    host_bytes: int
    """Of what waits in the host's memory: tokens, pictures, weights."""
    cost: float
    """Expected time relative to the best schedule on unlimited memory."""
    bound: bool = False
    """Whether it takes less than `peak_bytes` for sure, by how much was not counted."""

    def __str__(self) -> str:
        host = f", {gigabytes(self.host_bytes)} in RAM" if self.host_bytes else ""
        about = "at most" if self.bound else "about"
        return f"{self.schedule}, {about} {gigabytes(self.peak_bytes)}{host}"


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
    host_bytes: float | None = None,
) -> Schedule:
    """The fastest schedule whose peak fits.

    Args:
        memory_bytes: what may be taken on the device.
        host_bytes: what may be taken in RAM by what waits there; if None, what this machine has.
        others: see `Workload`.

    Raises:
        PlanError: none fits.
    """
    found = plans(Workload(config, height, width, dtype, batch, device, weights))
    host_bytes = waiting_bytes() if host_bytes is None else host_bytes
    allowed = [p for p in found if p.host_bytes <= host_bytes]
    for candidate in allowed:
        if candidate.peak_bytes <= memory_bytes:
            return candidate.schedule
    smallest = min(allowed, key=lambda p: p.peak_bytes)
    leanest = min(found, key=lambda p: p.peak_bytes)
    message = (
        f"{width}×{height} px needs at least {gigabytes(smallest.peak_bytes)} with this model"
        f" ({smallest.schedule}), got {gigabytes(memory_bytes)}"
    )
    if leanest is not smallest:
        message += f"; or {leanest}, of which {gigabytes(host_bytes)} are free"
    raise PlanError(message)


def check_host(work: Workload, schedule: Schedule) -> None:
    """Refuse a schedule that keeps more in RAM than there is.

    Raises:
        PlanError: says how much it needs.
    """
    needed, free = host_bytes(work, schedule), waiting_bytes()
    if needed > free:
        raise PlanError(
            f"{work.width}×{work.height} px, {schedule}: {gigabytes(needed)} would wait in RAM, of"
            f" which {gigabytes(free)} can be taken. Expected an order that keeps less there"
        )


@lru_cache(maxsize=64)  # a sampling run of ComfyUI asks in every evaluation
def plans(work: Workload) -> tuple[Plan, ...]:
    """All schedules worth considering, the fastest first.

    None of them is at once no faster and no leaner than another.
    """
    found = candidates(
        work.grid,
        work.best_blocks,
        host=work.device not in _UNIFIED,
        alone=work.weights,
        pictures=work.picture_bytes > 0,
    )
    made = [Plan(s, peak_bytes(work, s), host_bytes(work, s), _cost(work, s)) for s in found]
    made.sort(key=lambda p: (round(p.cost, 2), p.peak_bytes, p.host_bytes))
    useful: list[Plan] = []
    for p in made:
        if all(p.peak_bytes < q.peak_bytes or p.host_bytes < q.host_bytes for q in useful):
            useful.append(p)
    return tuple(useful)


def lean_plan(found: Sequence[Plan], memory_bytes: float, host_bytes: float) -> Plan | None:
    """Of plans that fit, and hardly take more time than the fastest, the leanest; None if none."""
    fitting = [p for p in found if p.peak_bytes <= memory_bytes and p.host_bytes <= host_bytes]
    fast = [p for p in fitting if p.cost <= _FAST_COST * fitting[0].cost]
    return min(fast, key=lambda p: p.peak_bytes + p.host_bytes, default=None)


def small_plan(work: Workload, memory_bytes: float) -> Plan | None:
    """The fastest plan by a generous bound of its memory; None where that does not surely fit.

    Measuring takes seconds, longer than a small picture itself.
    """
    found = candidates(work.grid, work.best_blocks, host=False, alone=False)
    fastest = min(found, key=lambda schedule: round(_cost(work, schedule), 2))
    chunk, waiting = _blocks_of(work, fastest)
    blocks = _TOKEN_TENSORS * chunk.blocks + waiting
    bound = blocks * work.block_bytes + _lr_bytes(work, fastest)
    rows, width = _prior_band(work)
    prior = _PRIOR_TENSORS * work.config.prior_width * work.batch * rows * width
    bound = max(bound, prior * work.dtype.itemsize) + work.picture_bytes
    bound += work.residual * work.grid.blocks * work.block_bytes
    bound += weight_bytes(work.config, work.dtype)
    if bound > _SMALL_SHARE * memory_bytes:
        return None
    return Plan(fastest, bound, 0, _cost(work, fastest), bound=True)


def peak_bytes(work: Workload, schedule: Schedule) -> int:
    """Bytes alive on the device at the peak: of sampling, or of the prior before it."""
    total = evaluation_bytes(work, schedule) + _lr_bytes(work, schedule)
    total = max(total, prior_bytes(work))
    if schedule.pictures_device is None:
        total += work.picture_bytes
    if work.residual and not schedule.on_host:
        total += work.grid.blocks * work.block_bytes
    if work.weights:
        total += weight_bytes(work.config, work.dtype, streamed=schedule.stream_weights)
    return total


def host_bytes(work: Workload, schedule: Schedule) -> int:
    """Bytes of what waits in the host's memory."""
    waiting = schedule.residency(work.grid, work.config.num_layers).host
    if work.residual and schedule.on_host:
        waiting += work.grid.blocks
    total = waiting * work.block_bytes
    if schedule.pictures_device is not None:
        total += work.picture_bytes
    if schedule.stream_weights:
        total += weight_bytes(work.config, work.dtype)
        total -= weight_bytes(work.config, work.dtype, streamed=True)
    return total


def evaluation_bytes(work: Workload, schedule: Schedule) -> int:
    """Bytes of tokens, frontiers and the chunk at work: what the schedule decides about."""
    chunk, waiting = _blocks_of(work, schedule)
    at_work = _chunk_bytes(
        work.config,
        chunk.rows,
        chunk.columns,
        work.dtype,
        work.batch,
        schedule.keep_lr,
        "cuda" if work.fused else "cpu",
    )
    return at_work + waiting * work.block_bytes


def _blocks_of(work: Workload, schedule: Schedule) -> tuple[Chunk, int]:
    """The chunk at work, and tokens of blocks that wait on the device meanwhile."""
    kept = schedule.residency(work.grid, work.config.num_layers)
    between = 0
    if work.strip_of_columns is not None:
        between = 2 * _LINES_BETWEEN * (work.grid.line_blocks + 1)  # keys and values
    return kept.chunk, kept.device + between


@lru_cache(maxsize=16)
def weight_bytes(config: InfDiTConfig, dtype: torch.dtype, *, streamed: bool = False) -> int:
    """Bytes of the network's parameters; of those on the device where layers come in turn."""
    if not streamed:
        return sum(math.prod(s) for s in parameter_shapes(config).values()) * dtype.itemsize
    net = InfDiT(config, dtype=dtype, device="meta")
    layer = sum(p.nbytes for p in net.layers[0].parameters())
    return sum(p.nbytes for p in resident_parameters(net)) + SLOTS * layer


def prior_bytes(work: Workload) -> int:
    """Bytes of the prior at work, which is over when sampling begins; 0 without one."""
    config = work.config
    if not config.prior_width:
        return 0
    return _prior_band_bytes(config, work.batch, *_prior_band(work), work.dtype)


def _prior_band(work: Workload) -> tuple[int, int]:
    """Height and width in LR pixels of what the prior takes at a time."""
    height, width = (n * work.config.block_px // LR_SCALE for n in work.grid[:2])
    rows = max(1, BAND_PX // (work.batch * width)) + 2 * (2 * work.config.prior_depth + 2)
    return min(rows, height), width


def evaluation_flop(config: InfDiTConfig, height: int, width: int) -> float:
    """Floating point operations of one evaluation, multiply and add counted as two."""
    tokens = Workload(config, height, width, torch.float32).grid.blocks * config.block_tokens
    h, t = config.hidden_size, config.block_tokens
    linear = 2 * (4 * h * h + 2 * h * config.mlp_size)
    attention = 2 * 2 * 4 * t * h
    cross = 2 * 2 * h * h + 2 * 2 * config.lr_window**2 * h
    return float(tokens) * (config.num_layers * (linear + attention) + cross)


def _cost(work: Workload, schedule: Schedule) -> float:
    """Expected time relative to the best chunk with everything on the device."""
    kept = schedule.residency(work.grid, work.config.num_layers)
    doublings = math.log2(kept.chunk.blocks / work.best_blocks)
    cost = 1 + max(_LARGE_CHUNK_COST * doublings, -_SMALL_CHUNK_COST * doublings)
    cost += _LR_ANEW_COST * (not schedule.keep_lr) + _HOST_TOKENS_COST * kept.moved
    cost += _HOST_PICTURES_COST * (schedule.pictures_device is not None)
    if schedule.stream_weights:
        layer = weight_bytes(work.config, work.dtype) / work.config.num_layers
        tokens = (kept.turn or work.grid.blocks) * work.block_bytes
        cost += _HOST_WEIGHTS_COST + _HOST_TOKENS_COST * layer / tokens
    return cost


def _lr_bytes(work: Workload, schedule: Schedule) -> int:
    """The LR picture, and its keys and values with their border if they are kept."""
    config, grid, total = work.config, work.grid, 0
    if not (work.scratch or schedule.pictures_device is not None):
        total += work.batch * 3 * grid.blocks * (config.block_px // LR_SCALE) ** 2 * 4
    if schedule.keep_lr:
        tokens = math.prod((n + 2) * config.lr_block for n in (grid.rows, grid.columns))
        total += work.batch * 2 * tokens * config.hidden_size * work.dtype.itemsize
    return total


@lru_cache(maxsize=256)
def _chunk_bytes(
    config: InfDiTConfig,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    batch: int,
    keep_lr: bool,
    ways_of: str,
) -> int:
    """Peak of a chunk's own tensors through embedding, layers 0 and 1 and output."""
    config = replace(config, num_layers=min(2, config.num_layers))
    net = InfDiT(config, dtype=dtype, device="meta", attend=_attend_without_memory)
    net.requires_grad_(False)
    h, w = rows * config.block_px, columns * config.block_px
    x, sigma = torch.empty(batch, 3, h, w, device="meta"), torch.ones(batch, device="meta")
    c_in = sigma[:, None, None, None]
    vector = torch.empty(batch, config.vector_size, device="meta") if config.vector_size else None
    cond = Condition(x, x.new_empty(batch, 3, h // LR_SCALE, w // LR_SCALE), vector)
    run, schedule = Run(), LayerMajor(rows * columns, keep_lr=keep_lr)
    with fast.counted_as(ways_of), LiveBytes() as live:
        result = net(x, sigma, cond, schedule, run=run, dtype=dtype, c_in=c_in)
    # counted with the pictures, and with the LR picture
    return live.peak - result.nbytes - (run.lr_kv.nbytes if run.lr_kv is not None else 0)


@lru_cache(maxsize=256)
def _prior_band_bytes(
    config: InfDiTConfig, batch: int, height: int, width: int, dtype: torch.dtype
) -> int:
    """Peak of the prior over a band of an LR picture."""
    prior = Prior(config.prior_width, config.prior_depth, dtype=dtype, device="meta")
    prior.requires_grad_(False)
    with LiveBytes() as live:
        prior(torch.empty(batch, 3, height, width, dtype=dtype, device="meta"))
    return live.peak


def _attend_without_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention kernels keep nothing of the size of the scores."""
    return torch.empty_like(q)
