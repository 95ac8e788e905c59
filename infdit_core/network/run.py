"""What lasts over a sampling run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..blocks.host_buffer import HostBuffer
from .residual_cache import ResidualCache

Progress = Callable[[int, int], None]
"""Called after every cell of an evaluation with (cells done, cells in all); may raise to cancel."""


@dataclass(eq=False)
class Run:
    """What one evaluation of a sampling run leaves to the next. One run has one picture."""

    progress: Progress | None = None
    cache: ResidualCache | None = None
    """Leaves out layers where sigma has hardly changed; None computes everything."""
    lr_kv: Tensor | None = field(default=None, init=False, repr=False)
    """(2, B, y, x, A, d) keys and values of the LR picture, where a schedule keeps them."""
    host: HostBuffer = field(default_factory=HostBuffer, repr=False)
    """Memory of the host for what waits there in an evaluation."""

    def release(self) -> None:
        """Give back what was kept for further evaluations."""
        self.lr_kv = None
        self.host.release()
