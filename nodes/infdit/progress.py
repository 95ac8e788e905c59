"""What the user sees while sampling: a bar, a preview per step, and a line of text on the node."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from server import PromptServer
from torch.nn import functional as F

from ...infdit_core.memory.planner import gigabytes
from ...infdit_core.pictures.prepare import Canvas

_PREVIEW_MAX_PX = 512
_TEXT_SECONDS = 1.0
_TIMED_SHARE = 0.25
"""Share of an evaluation after the first that must have passed before time is estimated."""


def shows_progress(execute: Callable) -> Callable:
    """Hand a node's `execute` a `SamplingProgress`, whose text ends with the result or its lack."""

    @wraps(execute)
    def run(cls, *args: Any, **inputs: Any) -> Any:
        with SamplingProgress(cls.hidden.unique_id if cls.hidden else None) as progress:
            return execute(cls, *args, progress=progress, **inputs)

    return run


class NodeText:
    """The line of text on a node; `node_id` is None outside a running workflow."""

    def __init__(self, node_id: str | None) -> None:
        self._node_id = node_id
        self._shown: str | None = None
        self._told = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last line has stood long enough."""
        return time.monotonic() - self._told >= _TEXT_SECONDS

    def tell(self, text: str) -> None:
        """Show a line in place of the last one."""
        self._told = time.monotonic()
        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node_id is not None and text != self._shown:
            server.send_progress_text(text, self._node_id)
        self._shown = text

    def tell_stop(self, kind: type[BaseException], where: str) -> None:
        """Say where a run was cancelled, or stopped by an error."""
        cancelled = issubclass(kind, comfy.model_management.InterruptProcessingException)
        self.tell(f"{'cancelled' if cancelled else 'stopped'} at {where}")


class SamplingProgress:
    """One progress bar over all evaluations of a node's run, and a line of text on the node.

    Nothing is shown before `start`; leaving the `with` block shows the end, or where it stopped.

    Args:
        node_id: of the node in the workflow; None outside a running one.
    """

    def __init__(self, node_id: str | None = None) -> None:
        self._text = NodeText(node_id)
        self._started = False

    def start(
        self,
        image: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
        steps: int,
        evaluations: int,
        solver: str,
        device: torch.device | None = None,
    ) -> None:
        """Show what is to come, in place of what the last run left.

        Args:
            image: (B, H, W, 1, 3 or 4) in 0..1, the pictures to upscale.
            sizes: (height, width) after each pass of a picture.
            steps: of the sampler in a pass.
            evaluations: of the network in a pass; too few where a sampler takes more than is
                known, which is then learned from its steps.
            solver: its name, for the last line.
            device: of the network, whose memory is watched.
        """
        self._pictures, self._passes = len(image), len(sizes)
        self._pixels = [h * w for h, w in sizes] * len(image)
        self._steps, self._evaluations, self._solver = steps, evaluations, solver
        self._run = -1  # of the network over a picture: pictures times passes in all
        self._step = self._evaluated = self._all_evaluated = 0
        self._work = 0.0  # pixels evaluated so far
        self._share = 0.0
        self._first: tuple[float, float] | None = None  # when the first evaluation ended, its work
        self._notes: list[str] = []
        self._began = time.monotonic()
        self._device = device if device is not None and device.type == "cuda" else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        (height, width), (self._height, self._width) = image.shape[1:3], sizes[-1]
        self._started = True
        self._text.tell(f"{width}x{height} -> {self._width}x{self._height}, loading")
        self._bar = comfy.utils.ProgressBar(sum(self._pixels))
        self._canvas: Canvas | None = None
        self._bar.update_absolute(0, None, preview_of(image))

    def note(self, text: str) -> None:
        """Something that the last line should add."""
        self._notes.append(text)

    def begin(self, canvas: Canvas) -> None:
        """Called before every pass of every picture."""
        if self._evaluated:
            self._evaluations = self._evaluated  # as many as the last pass took
        self._run = min(self._run + 1, len(self._pixels) - 1)
        self._step = self._evaluated = 0
        self._canvas = canvas
        if self._run:
            self._text.tell(self._line())

    def cells(self, done: int, total: int) -> None:
        """Called after every chunk of every layer of an evaluation."""
        self._evaluations = max(self._evaluations, self._evaluated + 1)
        pixels = self._pixels[self._run]
        part = done / total
        share = (self._evaluated + part) / self._evaluations
        self._share = max(self._share, sum(self._pixels[: self._run]) + pixels * share)
        self._bar.update_absolute(self._share)
        now = time.monotonic()
        if done == total:
            self._evaluated += 1
            self._all_evaluated += 1
            self._work += pixels
            part = 0.0
            if self._first is None:
                self._first = now, self._work
        if self._text.due:
            self._text.tell(self._line(self._seconds_left(now, part)))

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """The sampler's callback: shows the denoised picture."""
        self._step += 1
        self._steps = max(self._steps, self._step)
        expected = round(self._evaluated / self._step * self._steps)
        self._evaluations = max(self._evaluations, expected)
        self._bar.update_absolute(self._bar.current, None, self._preview(denoised))

    def __enter__(self) -> SamplingProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            if self._started:
                self._bar.update_absolute(self._bar.total)
                self._text.tell(self._end())
            return
        where = self._where() if self._started and self._run >= 0 else ["the start"]
        self._text.tell_stop(kind, ", ".join(where))

    def _where(self) -> list[str]:
        """The picture, the pass and the step at work, as far as there are several."""
        picture, number = divmod(self._run, self._passes)
        counts = [
            ("picture", picture + 1, self._pictures),
            ("pass", number + 1, self._passes),
            ("step", min(self._step + 1, self._steps), self._steps),
        ]
        return [f"{what} {n} of {all_}" for what, n, all_ in counts if all_ > 1 or what == "step"]

    def _line(self, seconds: float | None = None) -> str:
        """The line of now: the node shows its first forty letters or so."""
        first, *others = self._where()
        left = [] if seconds is None else [f"about {duration(seconds, rough=True)} left"]
        return " · ".join([first, *left, *others])

    def _seconds_left(self, now: float, part: float) -> float | None:
        """From the evaluations after the first, in which a model's weights may be loaded."""
        if self._first is None:
            return None
        since, work = self._first
        pixels = self._pixels[self._run]
        timed = self._work - work + part * pixels
        if timed < _TIMED_SHARE * pixels:
            return None
        left = (sum(self._pixels) - self._share) * self._evaluations
        return (now - since) * left / timed

    def _end(self) -> str:
        many = f"{self._pictures} pictures of " if self._pictures > 1 else ""
        text = f"{many}{self._width}x{self._height} in {duration(time.monotonic() - self._began)}"
        if self._device is not None:
            text += f", {gigabytes(torch.cuda.max_memory_allocated(self._device))}"
        each = self._all_evaluated // len(self._pixels)
        return " · ".join([text, used(self._solver, self._steps, each), *self._notes])

    def _preview(self, denoised: torch.Tensor) -> tuple[str, Image.Image, int] | None:
        return preview(self._canvas.crop(denoised) if self._canvas else denoised)


def used(solver: str, steps: int, evaluations: int) -> str:
    """What a picture was drawn with, of the steps and evaluations of a pass."""
    if evaluations < 1:
        return "enlarged only"
    text = f"{solver}, {steps} step{'s' * (steps > 1)}"
    return text if evaluations == steps else f"{text}, {evaluations} evaluations"


def duration(seconds: float, *, rough: bool = False) -> str:
    """Seconds for people: two units at most; a rough one has no more than is known of a guess."""
    if rough and seconds < 60:
        seconds = 5 * math.ceil(seconds / 5)
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 600 and not rough:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(10 * round(minutes / 10) if rough else minutes, 60)
    return f"{hours} h {minutes} min" if hours < 10 and minutes else f"{hours} h"


def preview_of(image: torch.Tensor) -> tuple[str, Image.Image, int] | None:
    """`preview` of the first of pictures (B, H, W, 1, 3 or 4) in 0..1."""
    stride = max(1, max(image.shape[1:3]) // (2 * _PREVIEW_MAX_PX))  # a copy of all may not fit
    picture = image[:1, ::stride, ::stride, :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    return preview(picture * 2 - 1)


def preview(denoised: torch.Tensor) -> tuple[str, Image.Image, int] | None:
    """What a progress bar shows of (B, 3, H, W) in [-1, 1]; None if that fails."""
    try:
        return "JPEG", preview_image(denoised), _PREVIEW_MAX_PX
    except Exception as error:  # whatever it is, it is not worth hours of work
        logging.warning("Inf-DiT: no preview: %s", error)
        return None


def preview_image(denoised: torch.Tensor) -> Image.Image:
    """The first picture of (B, 3, H, W) in [-1, 1], at most 512 px wide and high."""
    picture = denoised[:1].float()
    factor = _PREVIEW_MAX_PX / max(picture.shape[-2:])
    if factor < 1:
        picture = F.interpolate(picture, scale_factor=factor, mode="area")
    levels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
