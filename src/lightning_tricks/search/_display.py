"""What is told on standard error while much is trained: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["Display"]


class Display(ABC):
    """Tells what is going on, within its `with` block.

    Args:
        show: Whether anything is told.
    """

    def __init__(self, *, show: bool) -> None:
        self.show = show
        self._bar: Any = None
        self._task: Any = None

    @abstractmethod
    def columns(self, progress: Any) -> Sequence[Any]:
        """Return the columns of the bar, made of those that rich's module has."""

    def __enter__(self) -> Self:
        if self.show and sys.stderr.isatty():
            try:
                console, progress = import_module("rich.console"), import_module("rich.progress")
            except ImportError:
                return self
            self._bar = progress.Progress(*self.columns(progress), console=console.Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", left="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, **state: Any) -> None:
        """Bring the bar up to date, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, **state)

    def say(self, text: str, *, style: str | None = None) -> None:
        """Tell a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        elif self.show:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
