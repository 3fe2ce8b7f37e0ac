"""The equal-weight mean of iterates, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def polyak(history: Sequence[Tensor], *, start: int = 0, every: int = 1, stop: int | None = None) -> Tensor:
    """Average ``history[k]``, the weights after k steps, over k = start, start + every, … up to stop."""
    total, count = history[0].double() * 0, 0
    for step in range(len(history)):
        if step >= start and (step - start) % every == 0 and (stop is None or step <= stop):
            total = total + history[step].double()
            count += 1
    return total / count
