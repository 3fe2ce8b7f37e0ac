"""How far a study is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

    from lightning_tricks.search._study import Cell
    from lightning_tricks.search._trial import Outcome

__all__ = ["Progress", "spell_time"]


class Progress:
    """Shows on standard error which trainings are done, which runs, and how long the others will take.

    Args:
        total: How many trainings there are.
        done: How many were done before.
        metric: What is told of each.
        show: Whether anything is shown.
    """

    def __init__(self, total: int, done: int, metric: str, *, show: bool) -> None:
        self.total, self.done, self.metric, self.show = total, done, metric, show
        self._times: list[float] = []
        self._began = 0.0
        self._running = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.show and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.done, left="")
        elif self.show and self.done:
            self._say(f"{self.done} of {self.total} trainings were done before.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, cell: Cell, seed: int) -> None:
        """Tell which training runs."""
        self._began, self._running = time.perf_counter(), f"{cell.name}, seed {seed}"
        if self._bar is not None:
            self._bar.update(self._task, description=self._running, left=self.left)

    def end(self, outcome: Outcome) -> None:
        """Tell what it came to."""
        self._times.append(time.perf_counter() - self._began)
        self.done += 1
        result = f"failed, {outcome.error}" if outcome.error is not None else f"{self.metric} {outcome.metrics[self.metric]:.6g}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=self.left)
            if outcome.error is not None:
                self._bar.console.print(f"{self._running}: {result}", style="red", markup=False, highlight=False, soft_wrap=True)
        elif self.show:
            width = len(str(self.total))
            self._say(f"[{self.done:>{width}}/{self.total}] {self._running}: {result} ({spell_time(self._times[-1])}{self.left})")

    @property
    def left(self) -> str:
        """The time that is expected for what is not done, by the mean of what was."""
        remaining = self.total - self.done
        return f", about {spell_time(remaining * sum(self._times) / len(self._times))} left" if self._times and remaining else ""

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def spell_time(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def _rich_bar() -> Any:
    try:
        console, progress = import_module("rich.console"), import_module("rich.progress")
    except ImportError:
        return None
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}{task.fields[left]}", markup=False),
    )
    return progress.Progress(*columns, console=console.Console(stderr=True))
