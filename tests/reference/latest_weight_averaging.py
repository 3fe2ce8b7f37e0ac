"""The mean of the latest checkpoints, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def lawa(history: Sequence[Tensor], *, window: int, every: int, start: int = 0) -> Tensor:
    """Average the latest `window` of ``history[start + every]``, ``history[start + 2 * every]``, …, the weights after so many steps."""
    checkpoints = [history[step].double() for step in range(start + every, len(history), every)]
    latest = checkpoints[-window:]
    total = latest[0] * 0
    for checkpoint in latest:
        total = total + checkpoint
    return total / len(latest)
