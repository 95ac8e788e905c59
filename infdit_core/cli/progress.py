"""What a terminal shows while pictures are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..sampling import Step


class Progress:
    """Two bars on a terminal: the solver's steps, and the chunks of blocks of an evaluation."""

    def __init__(self, name: str, steps: int) -> None:
        from tqdm import tqdm

        # disable=None: no bars where the output is no terminal
        self._steps = tqdm(desc=name, total=steps, unit="step", disable=None)
        self._cells = tqdm(desc="blocks", unit="chunk", position=1, leave=False, disable=None)

    def step(self, step: Step) -> None:
        self._steps.set_postfix_str(f"sigma {step.sigma:.3g}")
        self._steps.update(1)

    def cells(self, done: int, total: int) -> None:
        if done <= self._cells.n or self._cells.total is None:
            self._cells.reset(total)
        self._cells.update(done - self._cells.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._cells.close()
        self._steps.close()


@contextmanager
def evaluation_bar(name: str, total: int) -> Iterator[Callable[..., object]]:
    """A bar on a terminal, and what moves it by one evaluation, whatever it is called with."""
    from tqdm import tqdm

    with tqdm(desc=name, total=total, unit="evaluation", disable=None) as bar:
        yield lambda *_: bar.update(1)
