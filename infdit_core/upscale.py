"""The whole way of a picture: passes, canvas, drawing, colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .blocks.grid import Strip
from .blocks.schedules import Schedule
from .memory.adaptive import Adaptive, memory_budget
from .memory.host import require_memory, waiting_bytes
from .memory.planner import PlanError, Workload, check_host, lean_plan, plans, small_plan
from .network.condition import Condition
from .network.config import LR_SCALE
from .network.model import InfDiT
from .network.prior import interpolate
from .network.residual_cache import ResidualCache
from .network.run import Progress, Run
from .pictures.alpha import fill_invisible
from .pictures.colour_fix import fix_colours
from .pictures.mask import check_mask, lay_mask, masked, paste, resize_mask
from .pictures.prepare import Canvas, check_image, is_whole, pass_sizes, target_size
from .pictures.resize import enlarge, resize_into
from .pictures.start import check_start
from .pictures.wrap import check_wrap, lay_out
from .resume import State, digest
from .sampling import (
    AUTO,
    SOLVER_PICTURES,
    STATE_PICTURES,
    Callback,
    Preset,
    find_preset,
    gaussian,
    sample,
)
from .scratch import Empty, Scratch, in_memory


class Draw(Protocol):
    """What turns the network's inputs into a picture: our `Sampler`, ComfyUI's, a farm's worker."""

    @property
    def block_px(self) -> int:
        """Side of a block of the network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        ...

    @property
    def consistency(self) -> int:
        """Back-projections that a result wants, where nobody says otherwise."""
        ...

    def prepare(self, canvas: Canvas) -> Canvas:
        """A canvas with what the network makes of it before sampling."""
        ...

    def __call__(self, canvas: Canvas) -> Tensor:
        """A sampled (B, 3, H, W), about [-1, 1], like `canvas.concat`."""
        ...


@dataclass
class Sampler:
    """Draws with our own solvers: plans by memory, draws the noise, retries with a smaller plan."""

    model: InfDiT
    preset: Preset | str = AUTO
    """Solver and steps, or their name; auto is what the model's file asks for, else exact."""
    seed: int = 0
    """Of the noise, which is drawn on the CPU: the device does not change the picture."""
    denoise: float = 1.0
    """0..1, the share of the noise and of the steps; less keeps closer to the picture."""
    schedule: Schedule | None = None
    """The order of computation; the fastest that fits if None."""
    memory_bytes: float | None = None
    """What a plan may take on the device, weights included; what is free if None."""
    reuse_layers: int = 0
    """How many layers a `ResidualCache` leaves out."""
    callback: Callback | None = None
    """Called with every `Step`."""
    progress: Progress | None = None
    """Called after every cell of an evaluation."""
    scratch: Scratch | None = None
    """Where pictures live in files, and what each step leaves to a later run; in memory if None."""

    def __post_init__(self) -> None:
        if isinstance(self.preset, str):
            self.preset = find_preset(self.preset, self.model.metadata)

    @property
    def consistency(self) -> int:
        """Back-projections that the preset asks for."""
        return cast("Preset", self.preset).consistency

    @property
    def block_px(self) -> int:
        return self.model.config.block_px

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def empty(self) -> Empty:
        """Makes room for pictures."""
        return in_memory if self.scratch is None else self.scratch.empty

    def prepare(self, canvas: Canvas) -> Canvas:
        """The canvas with the picture of the model's prior, if it has one."""
        return with_prior(canvas, self.model, self.model.device, self.model.dtype, self.empty)

    def __call__(self, canvas: Canvas) -> Tensor:
        """A sampled (B, 3, H, W) float32 on the CPU."""
        shape = (*canvas.concat.shape[:2], *(canvas.noise_size or canvas.concat.shape[-2:]))
        noise = gaussian(shape, self.seed)
        if canvas.noise_size is not None:
            noise = canvas.noise(lambda shape: torch.cat(list(noise)).view(shape))
        return self.draw(canvas, noise)

    def draw(
        self, canvas: Canvas, noise: Tensor | Iterable[Tensor], strip: Strip | None = None
    ) -> Tensor:
        """A sampled (B, 3, H, W) float32 on the CPU.

        Args:
            noise: (B, 3, H, W) unit Gaussian, or pieces of it as from `gaussian`.
            strip: of the picture that the canvas is of; the canvas has the LR picture whole.
        """
        preset = cast("Preset", self.preset)
        sigmas = preset.sigmas(self.denoise, self.model.config.sigma_max)
        if len(sigmas) < 2:
            return canvas.first
        retry: Callable | None = None
        schedule = self.schedule
        if schedule is not None:
            check_host(self._workload(canvas, strip), schedule)
        else:
            adaptive = self.plan(canvas, strip)
            schedule = adaptive.plan.schedule
            # a strip that began an evaluation anew would want its neighbour's lines again
            retry = adaptive.call if strip is None else None
        pictures = schedule.pictures_device or self.device
        if self.scratch is not None:
            pictures = torch.device("cpu")
        return sample(
            self.model,
            Condition(canvas.concat.to(pictures), canvas.lr.to(pictures), canvas.vector),
            sigmas,
            noise=noise,
            solver=preset.solver,
            schedule=schedule,
            retry=retry,
            callback=self.callback,
            run=self.new_run(),
            start=canvas.start,
            wrap=canvas.wrap,
            mask=canvas.mask,
            strip=strip,
            empty=self.empty,
            state=self._state(canvas, sigmas),
        ).cpu()

    def plan(self, canvas: Canvas, strip: Strip | None = None) -> Adaptive:
        """The fastest schedule that fits for a canvas, and the smaller ones behind it.

        With pictures in files the leanest of those that are nearly as fast: their memory is to
        grow with the side of a picture, whatever a machine has.
        """
        work = self._workload(canvas, strip)
        memory, ram = self.memory_bytes or memory_budget(self.model), waiting_bytes()
        if work.scratch:
            found = plans(work)
            return Adaptive(found, memory, first=lean_plan(found, memory, ram), host_bytes=ram)
        return Adaptive(lambda: plans(work), memory, first=small_plan(work, memory), host_bytes=ram)

    def new_run(self) -> Run:
        """What the evaluations of a canvas share."""
        return Run(self.progress, ResidualCache(self.reuse_layers) if self.reuse_layers else None)

    def weights_digest(self) -> str:
        """Of all that decides what the network computes."""
        return digest(self.model.state_dict())

    def require_scratch(self, source: tuple[int, int], size: tuple[int, int]) -> None:
        """Refuse a pass whose pictures do not fit the disk, or cannot be in files.

        Args:
            source, size: (height, width) of the picture and of the result.

        Raises:
            InfDiTError: says what is needed.
        """
        if self.scratch is None:
            return
        if self.reuse_layers:
            raise PlanError(
                "expected no reuse of layers with pictures in scratch files: it keeps the tokens of"
                " the whole picture in memory"
            )
        block, solver = self.block_px, cast("Preset", self.preset).solver
        height, width = (math.ceil(side / block) * block for side in size)
        pictures = 1 + SOLVER_PICTURES[solver] + 2 * STATE_PICTURES[solver]
        needed = pictures * height * width
        if self.model.prior is not None:  # its picture before it is reduced
            needed = max(needed, height * width + (1 + LR_SCALE**2) * math.prod(source))
        needed = 3 * 4 * (needed + 3 / LR_SCALE**2 * height * width)
        self.scratch.require(needed, f"{size[1]}×{size[0]} px")

    def _state(self, canvas: Canvas, sigmas: Tensor) -> State | None:
        """What the sampling of a canvas leaves, where pictures are in files."""
        if self.scratch is None:
            return None
        if self._digest is None:
            self._digest = self.weights_digest()
        given = {"source": canvas.source}
        if canvas.vector is not None:
            given["vector"] = canvas.vector
        about = {
            "model": self._digest,
            "picture": digest(given),
            "size": [canvas.height, canvas.width],
            "seed": self.seed,
            "solver": cast("Preset", self.preset).solver,
            "sigmas": sigmas.tolist(),
            "dtype": str(self.model.dtype),
            "device": self.device.type,
        }
        return self.scratch.state(about)

    _digest: str | None = field(default=None, init=False, repr=False)

    def _workload(self, canvas: Canvas, strip: Strip | None = None) -> Workload:
        batch, _, height, width = canvas.concat.shape
        config, kind = self.model.config, self.device.type
        work = Workload(config, height, width, self.model.dtype, batch, kind)
        solver = SOLVER_PICTURES[cast("Preset", self.preset).solver]
        return replace(
            work,
            pictures=1 + solver,
            scratch=self.scratch is not None,
            residual=self.reuse_layers > 0,
            fused=self.model.fused,
            strip_of_columns=None if strip is None else strip.own_grid.by_columns,
        )


@torch.no_grad()
def with_prior(
    canvas: Canvas,
    model: InfDiT,
    device: torch.device,
    dtype: torch.dtype,
    empty: Empty = in_memory,
) -> Canvas:
    """The canvas with the picture of the model's prior, if it has one, as `concat`.

    That is written over, and not made anew. A prior makes a picture four times as large. For a
    smaller factor its picture is made from all pixels of the source, and then reduced.

    Args:
        device, dtype: of the computation; the pictures stay where they are.
        empty: makes room for pictures on the way.
    """
    if model.prior is None or canvas.scale <= 1:
        return canvas
    concat = canvas.concat
    if canvas.scale > LR_SCALE * 0.99:
        model.prior.add_to(concat, canvas.lr, device, dtype)
        return canvas
    source, margin = canvas.source_pixels(model.prior.reach, empty)
    if is_whole(concat):
        large = interpolate(source)
    else:
        sides = (LR_SCALE * side for side in source.shape[-2:])
        large = empty((*source.shape[:2], *sides), source.device)
        resize_into(large, source, lambda band: band.clamp_(-1, 1))
    model.prior.add_to(large, source, device, dtype)
    around = tuple(LR_SCALE * pixels for pixels in margin)
    large = large[..., around[0] : large.shape[-2] - around[0], around[1] :]
    large = large[..., : large.shape[-1] - around[1]]
    target = canvas.crop(concat)  # what is padded needs no prior
    if is_whole(concat):
        target.copy_(enlarge(large, (canvas.height, canvas.width)))
    else:
        resize_into(target, large)
    return replace(canvas, concat=canvas.wrap(concat)) if canvas.wrap else canvas


def upscale(
    image: Tensor,
    size: tuple[int, int] | float = 4.0,
    draw: Draw | None = None,
    *,
    model: InfDiT | None = None,
    vectors: Tensor | None = None,
    colour_fix: str = "none",
    consistency: int | None = None,
    start: Tensor | None = None,
    wrap: str = "none",
    mask: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Upscale pictures, each by itself; above 4 times in several passes.

    The colours of invisible pixels count nowhere, and come out as `fill_invisible` continues them.

    Args:
        image: (B, H, W, C) in 0..1, C = 1 (grey), 3 or 4 (alpha).
        size: (height, width) of the result in pixels, or how many times wider and higher it is.
        draw: turns a canvas into a picture; a `Sampler` of `model` with `settings` if None.
        model: from `load_model`.
        vectors: (B, vector_size) CLIP embeddings, for models that take them.
        colour_fix: one of `COLOUR_FIXES`.
        consistency: how many times the result is corrected so that, reduced again, it equals the
            picture; what the preset asks for if None.
        start: (1 or B, h, w, C) in 0..1, upscaled pictures of another origin that sampling starts
            from, in the last pass; the conditions stay those of `image`.
        wrap: one of `WRAPS`, the edges where the pictures go on around.
        mask: ([1 or B,] h, w) in 0..1: 1 is upscaled, 0 keeps the picture that sampling starts
            from, `start` or the enlarged one, also in several passes and beside what is drawn;
            between them the two are mixed in every step.
        settings: of `Sampler`, such as `seed`, `preset` or `denoise`.

    Returns:
        (B, height, width, 3, or 4 with alpha) float32 in 0..1 on the CPU.

    Raises:
        InfDiTError: the picture, the size or a setting cannot be worked with; or the result does
            not fit the RAM or the disk, which is known before anything is drawn.
    """
    if draw is None:
        if model is None:
            raise TypeError("upscale() needs a model or draw")
        draw = Sampler(model, **settings)
    elif settings:
        raise TypeError(f"settings go with a model, not with draw: {', '.join(settings)}")
    times = draw.consistency if consistency is None else consistency
    check_image(image)
    source_size = image.shape[1], image.shape[2]
    if not isinstance(size, tuple):
        size = target_size(source_size, size)
    check_wrap(wrap, colour_fix)
    if start is not None:
        check_start(start, len(image), size)
    if mask is not None:
        mask = check_mask(mask, len(image), size)
    passes, empty = pass_sizes(source_size, size), in_memory
    if isinstance(draw, Sampler) and draw.scratch is not None:
        check_scratch(image.shape[-1] == 4, len(image), start, wrap, mask)
        draw.require_scratch([source_size, *passes][-2], size)
        empty = draw.empty
    else:
        require_memory(size, draw.device, results=len(image))
    results = []
    for i, source in enumerate(image.split(1)):
        picture = kept = source = fill_invisible(source, wrap)
        for n, pass_size in enumerate(passes, 1):
            canvas = draw.prepare(lay_out(picture, pass_size, draw.block_px, wrap, empty))
            canvas.vector = None if vectors is None else vectors[i : i + 1]
            if start is not None and n == len(passes):
                first = fill_invisible(start[i % len(start)][None], wrap)
                canvas.start = lay_out(first, size, draw.block_px, wrap).concat
            if mask is None:
                x = canvas.consistent(draw(canvas), times, empty)
            else:
                laid = lay_mask(mask[i % len(mask)][None], canvas)
                if start is None:  # what is black is enlarged as if nothing had been drawn
                    plain = canvas
                    if n > 1:
                        plain = draw.prepare(lay_out(kept, pass_size, draw.block_px, wrap))
                        canvas.start = torch.lerp(plain.concat, canvas.concat, laid)
                    if n < len(passes):
                        kept = plain.finish(plain.concat)
                x = _drawn_where(laid, canvas, draw, times)
            picture = canvas.finish(x, empty)
            del canvas, x  # they would live beside what follows
        fixed = fix_colours(picture, source, colour_fix, empty)
        if mask is not None and colour_fix != "none":
            weight = resize_mask(mask[i % len(mask)][None], size).movedim(1, -1)
            fixed = torch.lerp(picture, fixed, weight.expand_as(fixed))
        results.append(fixed)
    return torch.cat(results) if len(results) > 1 else results[0]


def check_scratch(
    alpha: bool,
    pictures: int = 1,
    start: Tensor | None = None,
    wrap: str = "none",
    mask: Tensor | None = None,
) -> None:
    """Refuse what is not made in bands, with pictures in scratch files.

    Raises:
        PlanError: says what.
    """
    refused = {
        f"{pictures} pictures at a time": pictures > 1,
        "alpha": alpha,
        "a picture to start from": start is not None,
        f"wrap {wrap}": wrap != "none",
        "a mask": mask is not None,
    }
    if found := [name for name, there in refused.items() if there]:
        raise PlanError(
            f"{' and '.join(found)}: expected none of that with pictures in scratch files"
        )


def _drawn_where(mask: Tensor, canvas: Canvas, draw: Draw, consistency: int) -> Tensor:
    """(B, 3, H, W): what a canvas starts from, drawn where a mask (1, 1, H, W) is not black."""
    part = masked(canvas, mask, draw.block_px)
    if part is None:
        return canvas.first
    x = paste(draw(part), canvas)
    return torch.lerp(x, canvas.consistent(x, consistency), mask.to(x))
