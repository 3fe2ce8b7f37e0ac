"""Numbers that vary over training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import TYPE_CHECKING

from lightning_tricks._core.clock import Duration, FitLength, plain_duration

if TYPE_CHECKING:
    from lightning_tricks._core.lightning import Trainer

__all__ = ["Schedule", "follow"]


@dataclass(frozen=True, repr=False)
class Schedule(ABC):
    """A number that varies over training.

    As a learning-rate schedule it multiplies the base rate of each parameter group; elsewhere it gives the value itself.

    Step t counts the optimizer steps taken so far: the first step is taken with the value at 0. Over `warmup`, W steps, the value
    grows linearly to where the schedule begins, ``v_t = (t + 1)/(W + 1) · v_W``, so that no step is taken with zero and none is
    repeated. Moments, such as `stop`, count from the beginning of the fit; periods, such as `every`, repeat from the end of the
    warm-up.

    Args:
        warmup: Duration of the warm-up; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        A subclass is a frozen dataclass that says its value after the warm-up, and which of its fields are durations.
    """

    _: KW_ONLY
    warmup: int | str = 0

    def __post_init__(self) -> None:
        self._durations()  # which refuses what is none
        self._set("warmup", plain_duration(self.warmup))

    def _durations(self) -> dict[str, Duration]:
        """Return each duration under a name for errors and for the spans of `_after_warmup`."""
        return {"warmup": Duration.parse("warmup", self.warmup)}

    @abstractmethod
    def _after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        """Return the value that many steps after the warm-up; spans are durations in steps, by name."""

    def value(self, step: int, steps: float = math.inf, *, steps_per_epoch: float = math.inf) -> float:
        """Return the value with which the optimizer step after `step` others is taken.

        Args:
            step: Number t of optimizer steps taken so far.
            steps: Number of steps of the whole fit; needed for shares of it.
            steps_per_epoch: Number of steps of an epoch; needed for durations in epochs.

        Raises:
            TrickError: If a length is needed and not given.
        """
        return self._over(FitLength(steps, steps_per_epoch))(step)

    def _over(self, length: FitLength) -> Callable[[int], float]:
        """Return the value as a function of the step, for a fit of known length."""
        spans = {name: duration.of(name, length) for name, duration in self._durations().items()}
        warmup = spans["warmup"] = math.floor(spans["warmup"] + 1e-9)

        def value(step: int) -> float:
            after = self._after_warmup(max(0, step - warmup), spans)
            return after if step >= warmup else after * (step + 1) / (warmup + 1)

        return value

    def _set(self, name: str, value: object) -> None:
        """Write an attribute during construction, in the plain form of what was accepted."""
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        ordered = sorted(fields(self), key=lambda each: (each.kw_only, each.name == "warmup"))
        given = {each: getattr(self, each.name) for each in ordered}
        texts = (f"{each.name}={value!r}" for each, value in given.items() if each.default is MISSING or value != each.default)
        return f"{type(self).__name__}({', '.join(texts)})"


def follow(value: float | Schedule, trainer: Trainer) -> Callable[[int], float]:
    """Return a number, or one that varies, as a function of the optimizer steps taken so far.

    Durations are resolved here, which loads the training data if they are shares or epochs: from `configure_optimizers` on.

    Raises:
        TrickError: If the fit's length is needed and unknown.
    """
    if isinstance(value, Schedule):
        return value._over(FitLength.of(trainer, value._durations().values()))
    constant = float(value)
    return lambda _: constant
