"""Numbers that vary over training: learning rates, and whatever argument may be a `Schedule`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from typing_extensions import override

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.schedule import Schedule

__all__ = ["Constant", "Cosine", "Linear", "Schedule"]


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """One value throughout: with `warmup`, the warm-up alone.

    Args:
        level: The value.
        warmup: Duration over which the value grows linearly from zero; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [Constant(0.5, warmup=3).value(step) for step in range(5)]
        [0.125, 0.25, 0.375, 0.5, 0.5]
    """

    level: float = 1.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("level", float(check_in_interval("level", self.level, "(-∞, ∞)")))

    @override
    def _after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        return self.level


@dataclass(frozen=True, repr=False)
class _Descent(Schedule):
    """From one value to another, which it keeps from `stop` on."""

    initial: float = 1.0
    _: KW_ONLY
    final: float = 0.0
    stop: int | str = "100%"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initial", "final"):
            self._set(name, float(check_in_interval(name, getattr(self, name), "(-∞, ∞)")))
        self._set("stop", plain_duration(self.stop))

    @override
    def _durations(self) -> dict[str, Duration]:
        return {**super()._durations(), "stop": Duration.parse("stop", self.stop, least=1)}

    @override
    def _after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        length = spans["stop"] - spans["warmup"]
        return self.final + (self.initial - self.final) * self._left(step / length if step < length else 1.0)

    def _left(self, share: float) -> float:
        """Return how much of the way is left after a share of the time."""
        return 1 - share


@dataclass(frozen=True, repr=False)
class Linear(_Descent):
    """A straight line from `initial` to `final`: with T steps from the warm-up's end to `stop`, ``v = initial + (final − initial)·t/T``.

    Args:
        initial: The value after the warm-up.
        final: The value at `stop` and afterwards.
        stop: Moment at which the final value is reached.
        warmup: Duration over which the value grows linearly from zero; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [Linear(0.0, final=0.5).value(step, steps=4) for step in range(5)]
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """


@dataclass(frozen=True, repr=False)
class Cosine(_Descent):
    """Half a wave from `initial` to `final`: ``v = final + (initial − final)·(1 + cos(π·t/T))/2``.

    Args:
        initial: The value after the warm-up.
        final: The value at `stop` and afterwards.
        stop: Moment at which the final value is reached.
        warmup: Duration over which the value grows linearly from zero; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [round(Cosine(warmup=2).value(step, steps=6), 3) for step in range(7)]
        [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    @override
    def _left(self, share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2
