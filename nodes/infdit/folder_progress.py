"""What the user sees while a folder is upscaled: one bar over all pictures, preview and text."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType

import comfy.model_management
import comfy.utils
import torch

from ...infdit_core.pictures.prepare import Canvas
from ...infdit_core.sampling import Preset
from .progress import NodeText, duration, preview, preview_of, used


class FolderProgress:
    """One bar over all pictures, by the pixels of their results, and a line of text on the node.

    Leaving the `with` block by an error shows where it stopped.
    """

    def __init__(self, node_id: str | None) -> None:
        self._text = NodeText(node_id)
        self._began = time.monotonic()
        self._work: list[int] = []
        self._name, self._n, self._share, self._evaluated = "", 0, 0.0, 0

    def start(self, work: Sequence[int], preset: Preset) -> None:
        """Called before all.

        Args:
            work: pixels of each result, over all passes; 0 where that is not known.
            preset: what each pass of a picture is drawn with; its steps may be 0.
        """
        self._preset = preset
        self._work = [max(1, pixels) for pixels in work]
        self._bar = comfy.utils.ProgressBar(max(1, sum(self._work)))

    def picture(self, n: int, name: str) -> None:
        """Called before each picture."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._n, self._name, self._evaluations = n, name, max(1, self._preset.evaluations)
        self._share, self._evaluated = float(sum(self._work[:n])), 0
        self._canvas: Callable[[], Canvas | None] = lambda: None  # not kept: it holds pictures
        self._pixels = 0
        self._passed = 0.0
        self._bar.update_absolute(self._share)
        self._text.tell(self._line())

    def source(self, image: torch.Tensor) -> None:
        """Shows the picture (1, H, W, C) that was read, in place of the last one."""
        self._bar.update_absolute(self._bar.current, None, preview_of(image))

    def begin(self, canvas: Canvas) -> None:
        """Called before every pass of a picture."""
        self._passed += self._pixels
        self._canvas, self._pixels = weakref.ref(canvas), canvas.height * canvas.width
        self._evaluated = 0

    def cells(self, done: int, total: int) -> None:
        """Called after every chunk of every layer of an evaluation."""
        part = min(1.0, (self._evaluated + done / total) / self._evaluations)
        self._evaluated += done == total
        pixels = self._passed + part * self._pixels
        before, work = sum(self._work[: self._n]), self._work[self._n]
        self._share = max(self._share, before + min(pixels, work))
        self._bar.update_absolute(self._share)
        if self._text.due:
            self._text.tell(self._line())

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """The sampler's callback: shows the denoised picture."""
        canvas = self._canvas()
        picture = denoised if canvas is None else canvas.crop(denoised)
        self._bar.update_absolute(self._bar.current, None, preview(picture))

    def end(self, made: int, there: int, failed: int) -> None:
        """Called when all is done, with the numbers of pictures."""
        self._bar.update_absolute(self._bar.total)
        parts = []
        if failed:
            parts.append(f"{failed} of {made + failed} pictures failed")
        if made or not (there or failed):
            took = duration(time.monotonic() - self._began)
            parts.append(f"{made} picture{'s' * (made != 1)} in {took}")
        if there:
            parts.append(f"{there} {'were' if there > 1 else 'was'} there already")
        if made:
            parts.append(used(self._preset.solver, self._preset.steps, self._preset.evaluations))
        self._text.tell(" · ".join(parts))

    def __enter__(self) -> FolderProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            where = f"{self._where()}, {self._name}" if self._name else "the start"
            self._text.tell_stop(kind, where)

    def _where(self) -> str:
        return f"picture {self._n + 1} of {len(self._work)}"

    def _line(self) -> str:
        """The line of now; the time left is known when a picture is done."""
        left = []
        if self._n:
            share = (sum(self._work) - self._share) / self._share
            seconds = (time.monotonic() - self._began) * share
            left = [f"about {duration(seconds, rough=True)} left"]
        return " · ".join([self._where(), *left, self._name])
