"""The whole way of a picture: passes, canvas, drawing, colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .blocks.schedules import Schedule
from .memory.adaptive import Adaptive, memory_budget
from .memory.host import require_memory
from .memory.planner import Workload, plans
from .network.condition import Condition
from .network.model import InfDiT
from .network.residual_cache import ResidualCache
from .network.run import Progress
from .pictures.colour_fix import fix_colours
from .pictures.mask import check_mask, lay_mask, masked, paste, resize_mask
from .pictures.prepare import Canvas, check_image, pass_sizes, target_size
from .pictures.start import check_start
from .pictures.wrap import check_wrap, lay_out
from .sampling import PRESETS, Callback, Preset, sample


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

    def __call__(self, canvas: Canvas) -> Tensor:
        """A sampled (B, 3, H, W), about [-1, 1], like `canvas.concat`."""
        ...


@dataclass
class Sampler:
    """Draws with our own solvers: plans by memory, draws the noise, retries with a smaller plan."""

    model: InfDiT
    preset: Preset = PRESETS["exact"]
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

    @property
    def block_px(self) -> int:
        return self.model.config.block_px

    @property
    def device(self) -> torch.device:
        return self.model.final.linear.weight.device

    def __call__(self, canvas: Canvas) -> Tensor:
        """A sampled (B, 3, H, W) float32 on the CPU."""
        sigmas = self.preset.sigmas(self.denoise)
        if len(sigmas) < 2:
            return canvas.first
        retry: Callable | None = None
        schedule = self.schedule
        if schedule is None:
            adaptive = self.plan(canvas)
            schedule, retry = adaptive.plan.schedule, adaptive.call
        device = self.device
        concat = canvas.concat.to(schedule.pictures_device or device)
        generator = torch.Generator().manual_seed(self.seed)
        return sample(
            self.model,
            Condition(concat, canvas.lr.to(device), canvas.vector),
            sigmas,
            noise=canvas.noise(lambda shape: torch.randn(shape, generator=generator)),
            solver=self.preset.solver,
            schedule=schedule,
            retry=retry,
            callback=self.callback,
            progress=self.progress,
            cache=ResidualCache(self.reuse_layers) if self.reuse_layers else None,
            start=canvas.start,
            wrap=canvas.wrap,
            mask=canvas.mask,
        ).cpu()

    def plan(self, canvas: Canvas) -> Adaptive:
        """The fastest schedule that fits for a canvas, and the smaller ones behind it."""
        weight = self.model.final.linear.weight
        batch, _, height, width = canvas.concat.shape
        config, kind = self.model.config, weight.device.type
        work = Workload(config, height, width, weight.dtype, batch, kind)
        work = replace(work, residual=self.reuse_layers > 0)
        return Adaptive(plans(work), self.memory_bytes or memory_budget(self.model))


def upscale(
    image: Tensor,
    size: tuple[int, int] | float = 4.0,
    draw: Draw | None = None,
    *,
    model: InfDiT | None = None,
    vectors: Tensor | None = None,
    colour_fix: str = "none",
    start: Tensor | None = None,
    wrap: str = "none",
    mask: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Upscale pictures, each by itself; above 4 times in several passes.

    Args:
        image: (B, H, W, C) in 0..1, C = 1 (grey), 3 or 4 (alpha).
        size: (height, width) of the result in pixels, or how many times wider and higher it is.
        draw: turns a canvas into a picture; a `Sampler` of `model` with `settings` if None.
        model: from `load_model`.
        vectors: (B, vector_size) CLIP embeddings, for models that take them.
        colour_fix: one of `COLOUR_FIXES`.
        start: (1 or B, h, w, C) in 0..1, upscaled pictures of another origin that sampling starts
            from, in the last pass; the conditions stay those of `image`.
        wrap: one of `WRAPS`, the edges where the pictures go on around.
        mask: ([1 or B,] h, w) in 0..1: 1 is upscaled, 0 keeps the picture that sampling starts
            from, `start` or the enlarged one, between them the two are mixed in every step.
        settings: of `Sampler`, such as `seed`, `preset` or `denoise`.

    Returns:
        (B, height, width, 3, or 4 with alpha) float32 in 0..1 on the CPU.

    Raises:
        InfDiTError: the picture, the size or a setting cannot be worked with; or the result does
            not fit the RAM, which is known before anything is drawn.
    """
    if draw is None:
        if model is None:
            raise TypeError("upscale() needs a model or draw")
        draw = Sampler(model, **settings)
    elif settings:
        raise TypeError(f"settings go with a model, not with draw: {', '.join(settings)}")
    check_image(image)
    source_size = image.shape[1], image.shape[2]
    if not isinstance(size, tuple):
        size = target_size(source_size, size)
    check_wrap(wrap, colour_fix)
    if start is not None:
        check_start(start, len(image), size)
    if mask is not None:
        mask = check_mask(mask, len(image), size)
    require_memory(size, draw.device, results=len(image))
    passes = pass_sizes(source_size, size)
    results = []
    for i, source in enumerate(image.split(1)):
        picture = source
        for n, pass_size in enumerate(passes, 1):
            canvas = lay_out(picture, pass_size, draw.block_px, wrap)
            canvas.vector = None if vectors is None else vectors[i : i + 1]
            if start is not None and n == len(passes):
                first = start[i % len(start)][None]
                canvas.start = lay_out(first, size, draw.block_px, wrap).concat
            if mask is None:
                picture = canvas.finish(draw(canvas))
            else:
                laid = lay_mask(mask[i % len(mask)][None], canvas)
                part = masked(canvas, laid, draw.block_px)
                picture = canvas.finish(canvas.first if part is None else paste(draw(part), canvas))
        fixed = fix_colours(picture, source, colour_fix)
        if mask is not None and colour_fix != "none":
            weight = resize_mask(mask[i % len(mask)][None], size).movedim(1, -1)
            fixed = torch.lerp(picture, fixed, weight.expand_as(fixed))
        results.append(fixed)
    return torch.cat(results)
