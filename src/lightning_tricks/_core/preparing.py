"""What tricks do once training data are there, and before any callback hears of the start of training, in an order of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_tricks._core.lightning import Trainer

__all__ = ["prepare"]


class _Start:
    """Stands in for a fit loop's `on_run_start`: runs tasks, those of lower turns first, and then the loop's own."""

    def __init__(self, own: Callable[[], None]) -> None:
        self.own = own
        self.tasks: list[tuple[int, Callable[[], None]]] = []

    def __call__(self) -> None:
        for _, task in sorted(self.tasks, key=lambda entry: entry[0]):
            task()
        self.own()


def prepare(trainer: Trainer, task: Callable[[], None], *, turn: int) -> Callable[[], None]:
    """Let a task run before training starts, whatever the order of the callbacks; return what takes it away again."""
    loop = trainer.fit_loop
    start = vars(loop).get("on_run_start")
    if not isinstance(start, _Start):
        start = _Start(loop.on_run_start)
        vars(loop)["on_run_start"] = start
    entry = turn, task
    start.tasks.append(entry)

    def undo() -> None:
        if entry in start.tasks:
            start.tasks.remove(entry)
        if not start.tasks and vars(loop).get("on_run_start") is start:
            del vars(loop)["on_run_start"]

    return undo
