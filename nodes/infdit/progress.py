"""What the user sees while sampling: progress per chunk of blocks, a preview per step."""

from __future__ import annotations

import logging
import time

import comfy.utils
import torch
from PIL import Image
from server import PromptServer
from torch.nn import functional as F

from ...infdit_core.memory.planner import Plan
from ...infdit_core.pictures.prepare import Canvas

_PREVIEW_MAX_PX = 512
_TEXT_SECONDS = 1.0


class SamplingProgress:
    """One progress bar over all evaluations of a node's run, and a line of text on the node.

    Args:
        evaluations: of the network, over all steps, passes and pictures; too few where a
            sampler takes more than is known, which is then learned from its steps.
        steps: of the sampler, over all passes and pictures.
        node_id: of the node in the workflow; None outside a running one.
    """

    def __init__(self, evaluations: int, steps: int, node_id: str | None = None) -> None:
        self._evaluations = evaluations
        self._finished = 0
        self._steps = steps
        self._steps_done = 0
        self._bar = comfy.utils.ProgressBar(evaluations)
        self._node_id = node_id
        self._plan = ""
        self._started = self._told = time.monotonic()

    def begin(self, canvas: Canvas) -> None:
        """Called before every pass of every picture."""

    def planned(self, plan: Plan) -> None:
        """Called with the plan of every evaluation."""
        if str(plan) != self._plan:
            self._plan = str(plan)
            self._tell(self._plan)

    def cells(self, done: int, total: int) -> None:
        """Called after every chunk of every layer of an evaluation."""
        self._evaluations = max(self._evaluations, self._finished + 1)
        self._bar.update_absolute(self._finished * total + done, self._evaluations * total)
        share = (self._finished + done / total) / self._evaluations
        if done == total:
            self._finished += 1
        now = time.monotonic()
        if now - self._told >= _TEXT_SECONDS:
            left = round((now - self._started) * (1 - share) / share)
            self._tell(
                f"{self._plan}\n{self._steps_done} of {self._steps} steps,"
                f" {left // 60}:{left % 60:02d} left"
            )

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """The sampler's callback: shows the denoised picture."""
        self._steps_done += 1
        self._steps = max(self._steps, self._steps_done)
        expected = round(self._finished / self._steps_done * self._steps)
        self._evaluations = max(self._evaluations, expected)
        self._bar.update_absolute(self._bar.current, None, self._preview(denoised))

    def _preview(self, denoised: torch.Tensor) -> tuple[str, Image.Image, int] | None:
        try:
            return "JPEG", preview_image(denoised), _PREVIEW_MAX_PX
        except Exception as error:  # whatever it is, it is not worth hours of work
            logging.warning("Inf-DiT: no preview: %s", error)
            return None

    def _tell(self, text: str) -> None:
        self._told = time.monotonic()
        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node_id is not None:
            server.send_progress_text(text, self._node_id)


def preview_image(denoised: torch.Tensor) -> Image.Image:
    """The first picture of (B, 3, H, W) in [-1, 1], at most 512 px wide and high."""
    picture = denoised[:1].float()
    factor = _PREVIEW_MAX_PX / max(picture.shape[-2:])
    if factor < 1:
        picture = F.interpolate(picture, scale_factor=factor, mode="area")
    levels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
