"""What HiDiffusion does to which block in which step: plain Python, nothing of ComfyUI.

Source: Zhang et al., "HiDiffusion", ECCV 2024 (arXiv 2311.17528), with the constants of the
authors' code. Sizes are in latent pixels, blocks are numbered as in ComfyUI's UNetModel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

Size = tuple[int, int]
"""Height and width in latent pixels."""


@dataclass(frozen=True)
class Family:
    """The blocks of one kind of UNet, and where HiDiffusion reaches into them."""

    name: str
    layout: str
    """Input blocks/middle/output blocks: r convolutions only, a with attention, D down-sampler,
    R and A the same as r and a with an up-sampler behind."""
    native: int
    """Side of the square that the model was trained at."""
    large: int
    """From this side on, in both directions, the ratios for very large pictures hold."""
    rad: int | None
    """Input block whose down-sampler is dilated (RAD); None: never."""
    pool: int
    """Input block after which the features are pooled."""
    unpool: int
    """Output block before which they are enlarged again."""
    windowed: tuple[tuple[str, int], ...]
    """Blocks whose self-attention works in windows."""
    depth: int
    """Transformer layers in each of those."""

    @property
    def blocks(self) -> int:
        """Number of input blocks, which is that of output blocks."""
        return len(self.layout.split("/")[0])

    def is_native(self, size: Size) -> bool:
        """Whether the model can draw a picture of this size without help.

        The area counts as well as the longer side: SDXL was trained at sizes up to 4:1.
        """
        return max(size) < 1.25 * self.native or size[0] * size[1] < 1.25 * self.native**2

    def is_large(self, size: Size) -> bool:
        return min(size) >= self.large


SDXL = Family(
    name="SDXL",
    layout="rrrDaaDaa/a/aaAaaArrr",
    native=128,
    large=512,
    rad=6,
    pool=4,
    unpool=5,
    windowed=(("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)),
    depth=2,
)
SDXL_TURBO = replace(SDXL, name="SDXL-Turbo", native=64, rad=None)
SD15 = Family(
    name="SD1.5/2.x",
    layout="raaDaaDaaDrr/a/rrRaaAaaAaaa",
    native=64,
    large=256,
    rad=3,
    pool=4,
    unpool=8,
    windowed=(("input", 1), ("input", 2), ("output", 9), ("output", 10), ("output", 11)),
    depth=1,
)


@dataclass(frozen=True)
class Ratios:
    """Ends of the phases as parts of the sampling steps, 0 to 1.

    SD1.5/2.x: RAD until t1, pool until t2. SDXL: pool until t1, RAD until t2; in aggressive mode
    RAD until `aggressive`, then pool until t1. SDXL-Turbo: pool until t1.
    """

    t1: float
    t2: float
    aggressive: float = 8 / 50


def official_ratios(family: Family, size: Size, controlnet: bool) -> Ratios:
    """The authors' constants for a picture of this size; SDXL with a ControlNet has its own."""
    if family.rad is None:
        return Ratios(0.5, 0.0)
    if family.is_large(size):
        return Ratios(0.7, 0.3)
    return Ratios(0.5 if controlnet and family.name == SDXL.name else 0.4, 0.0)


@dataclass(frozen=True)
class Phase:
    """A part of sampling: from `start` up to `end`, as parts of the steps."""

    start: float
    end: float

    def steps(self, count: int) -> range:
        """The steps of the phase in a run of `count`, cut off to whole steps as the authors do."""
        return range(int(self.start * count), int(self.end * count))


NEVER = Phase(0.0, 0.0)


@dataclass(frozen=True)
class Phases:
    """When the down-sampler is dilated and when the features are pooled."""

    rad: Phase = NEVER
    pool: Phase = NEVER


def phases(family: Family, ratios: Ratios, aggressive: bool) -> Phases:
    """The phases of one run. Only SDXL has an aggressive mode; the others ignore it."""
    if family.rad is None:
        return Phases(pool=Phase(0.0, ratios.t1))
    if family.layout == SD15.layout:
        return Phases(rad=Phase(0.0, ratios.t1), pool=Phase(0.0, ratios.t2))
    if aggressive:
        return Phases(rad=Phase(0.0, ratios.aggressive), pool=Phase(ratios.aggressive, ratios.t1))
    return Phases(rad=Phase(0.0, ratios.t2), pool=Phase(0.0, ratios.t1))


def shift_quarters(seed: int, step: int, block: tuple[str, int], index: int) -> int:
    """By how many quarters of a window, 0 to 3, the windows of one attention layer are shifted.

    A hash and no shared random state: sampling noise stays as it is, and the prompt and the
    negative prompt get the same windows even when they are evaluated one after the other.
    """
    key = f"{seed}:{step}:{block[0]}:{block[1]}:{index}"
    return hashlib.sha256(key.encode()).digest()[0] % 4


@dataclass(frozen=True)
class FeatureSizes:
    """Sizes of the features in a UNet that is being patched."""

    inputs: tuple[Size, ...]
    """At the layers of each input block."""
    skips: tuple[Size, ...]
    """What each input block hands on: pooled at the pool block."""

    @property
    def middle(self) -> Size:
        return self.skips[-1]

    def at(self, block: tuple[str, int]) -> Size:
        """At the layers of ("input", i) or ("output", i)."""
        side, i = block
        return self.inputs[i] if side == "input" else self.skips[-1 - i]


def feature_sizes(family: Family, size: Size, rad: bool, pool: bool) -> FeatureSizes:
    """Sizes for a latent of `size`: everything that halves rounds up."""
    inputs, skips = [], []
    for i, kind in enumerate(family.layout.split("/")[0]):
        if kind == "D":
            size = _shrunk(size, 4 if rad and i == family.rad else 2)
        inputs.append(size)
        if pool and i == family.pool:
            size = _shrunk(size, 2)
        skips.append(size)
    return FeatureSizes(tuple(inputs), tuple(skips))


def _shrunk(size: Size, factor: int) -> Size:
    return -(-size[0] // factor), -(-size[1] // factor)
