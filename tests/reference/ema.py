"""The exponential moving average, written down as slowly and literally as its formula, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def decay_at(t: int, beta: float, warmup: int) -> float:
    """β_t = min(β, (1 + t)/(10 + t)) while warming up, and β afterwards."""
    if t < warmup:
        return min(beta, (1 + t) / (10 + t))
    return beta


def ema(history: Sequence[Tensor], beta: float, *, start: int = 0, every: int = 1, warmup: int = 0) -> Tensor:
    """Average ``history[k]``, the weights after k steps: e ← β·e + (1 − β)·w, with the decays of skipped steps multiplied."""
    average = history[start].double()
    kept = 1.0
    for step in range(start + 1, len(history)):
        t = step - start - 1
        kept = kept * decay_at(t, beta, warmup)
        if (step - start) % every == 0:
            average = kept * average + (1 - kept) * history[step].double()
            kept = 1.0
    return average
