"""How far a study is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from lightning_tricks._core.lightning import override
from lightning_tricks.search._display import Display

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks.search._study import Cell
    from lightning_tricks.search._trial import Outcome

__all__ = ["Progress", "spell_time"]


class Progress(Display):
    """Shows on standard error which trainings are done, which runs, and how long the others will take.

    Args:
        total: How many trainings there are.
        done: How many were done before.
        metric: What is told of each.
        show: Whether anything is shown.
    """

    def __init__(self, total: int, done: int, metric: str, *, show: bool) -> None:
        super().__init__(show=show)
        self.total, self.done, self.metric = total, done, metric
        self._times: list[float] = []
        self._began = 0.0
        self._running = ""

    @override
    def columns(self, progress: Any) -> Sequence[Any]:
        text = progress.TextColumn("{task.description}{task.fields[left]}", markup=False)
        return progress.BarColumn(), progress.MofNCompleteColumn(), text

    @override
    def __enter__(self) -> Self:
        super().__enter__()
        self.advance(total=self.total, completed=self.done)
        if self._bar is None and self.done:
            self.say(f"{self.done} of {self.total} trainings were done before.")
        return self

    def begin(self, cell: Cell, seed: int) -> None:
        """Tell which training runs."""
        self._began, self._running = time.perf_counter(), f"{cell.name}, seed {seed}"
        self.advance(description=self._running, left=self.left)

    def end(self, outcome: Outcome) -> None:
        """Tell what it came to."""
        self._times.append(time.perf_counter() - self._began)
        self.done += 1
        result = f"failed, {outcome.error}" if outcome.error is not None else f"{self.metric} {outcome.metrics[self.metric]:.6g}"
        self.advance(completed=self.done, left=self.left)
        if self._bar is None:
            width = len(str(self.total))
            self.say(f"[{self.done:>{width}}/{self.total}] {self._running}: {result} ({spell_time(self._times[-1])}{self.left})")
        elif outcome.error is not None:
            self.say(f"{self._running}: {result}", style="red")

    @property
    def left(self) -> str:
        """The time that is expected for what is not done, by the mean of what was."""
        remaining = self.total - self.done
        return f", about {spell_time(remaining * sum(self._times) / len(self._times))} left" if self._times and remaining else ""


def spell_time(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
