"""Numbers that vary over training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks._core.clock import Duration, FitLength, plain_duration
from lightning_tricks._core.schedulers import CurveScheduler, StepScheduler
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_tricks._core.lightning import Trainer

__all__ = ["Schedule", "check_varying", "follow"]


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
        A subclass is a frozen dataclass that gives its value by `after_warmup`, and names its fields in two class variables: `levels`
        are values between which it stays, `spans` are durations.

    Example:
        >>> from lightning_tricks import schedules
        >>> schedule = schedules.Linear(warmup="30%")
        >>> [round(schedule.value(step, steps=10), 2) for step in range(10)]
        [0.25, 0.5, 0.75, 1.0, 0.86, 0.71, 0.57, 0.43, 0.29, 0.14]
    """

    levels: ClassVar[tuple[str, ...]] = ()
    spans: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    warmup: int | str = 0

    def __post_init__(self) -> None:
        for name in self.levels:
            self._check(name, "(-∞, ∞)")
        self._durations()  # which refuses what is none
        for name in ("warmup", *self.spans):
            value = getattr(self, name)
            self._set(name, None if value is None else plain_duration(value))

    @abstractmethod
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        """Return the value s steps after the end of the warm-up.

        Args:
            step: The number s.
            spans: The durations in steps, by the names of their fields; moments count from the beginning of the fit.
        """

    def beginning(self, spans: Mapping[str, float]) -> float:
        """Return the value to which the warm-up grows; not that at the schedule's end, should that come before the warm-up's.

        Args:
            spans: As for `after_warmup`.
        """
        return self.after_warmup(0, spans)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value after the warm-up."""
        values = [getattr(self, name) for name in self.levels] or [-math.inf, math.inf]
        return min(values), max(values)

    @property
    def metric(self) -> str | None:
        """The metric that the schedule follows, if it does not depend on the step alone."""
        return None

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

    def _durations(self) -> dict[str, Duration]:
        """Return the durations by the names of their fields, without those that are None."""
        given = {name: getattr(self, name) for name in self.spans if getattr(self, name) is not None}
        durations = {name: Duration.parse(name, value, least=1) for name, value in given.items()}
        return {"warmup": Duration.parse("warmup", self.warmup), **durations}

    def _over(self, length: FitLength) -> Callable[[int], float]:
        """Return the value as a function of the step, for a fit of known length."""
        spans = {name: duration.of(name, length) for name, duration in self._durations().items()}
        warmup = spans["warmup"] = math.floor(spans["warmup"] + 1e-9)

        def value(step: int) -> float:
            if step < warmup:
                return self.beginning(spans) * (step + 1) / (warmup + 1)
            return self.after_warmup(step - warmup, spans)

        return value

    def _over_fit(self, trainer: Trainer) -> Callable[[int], float]:
        """Return the value as a function of the step, for the Trainer's fit."""
        return self._over(FitLength.of(trainer, self._durations().values()))

    def _scheduler(self, optimizer: Optimizer) -> StepScheduler:
        """Return the scheduler of torch that applies this schedule to learning rates, once it is told to begin."""
        return CurveScheduler(optimizer)

    def _check(self, name: str, interval: str) -> None:
        """Accept a number in an interval."""
        self._set(name, float(check_in_interval(name, getattr(self, name), interval)))

    def _set(self, name: str, value: object) -> None:
        """Write an attribute during construction, in the plain form of what was accepted."""
        object.__setattr__(self, name, value)

    @override
    def __repr__(self) -> str:
        ordered = sorted(fields(self), key=lambda each: (each.kw_only, each.name == "warmup"))
        given = {each: getattr(self, each.name) for each in ordered}
        texts = (f"{each.name}={value!r}" for each, value in given.items() if each.default is MISSING or value != each.default)
        return f"{type(self).__name__}({', '.join(texts)})"


def check_varying(name: str, value: float | Schedule, interval: str) -> float | Schedule:
    """Accept a number in an interval, or a schedule that stays there; intervals are written as in `check_in_interval`.

    Raises:
        ArgumentError: If the value is neither, or the schedule follows a metric.
    """
    if not isinstance(value, Schedule):
        return check_in_interval(name, value, interval)
    if value.metric is not None:
        msg = f"`{name}` may be a Schedule of the step, got {value!r}, which follows a metric. Use it for learning rates alone."
        raise ArgumentError(msg)
    for bound in value.bounds:
        if not (math.isinf(bound) and "∞" in interval):
            try:
                check_in_interval(name, bound, interval)
            except ArgumentError as error:
                msg = f"`{name}` must lie in {interval}, and {value!r} reaches {bound:g}."
                raise ArgumentError(msg) from error
    return value


def follow(value: float | Schedule, trainer: Trainer) -> Callable[[int], float]:
    """Return a number, or one that varies, as a function of the optimizer steps taken so far.

    Durations are resolved here. If they are shares or epochs, the training data must be known: from `on_train_start` on.

    Raises:
        TrickError: If the fit's length is needed and unknown.
    """
    if isinstance(value, Schedule):
        return value._over_fit(trainer)
    constant = float(value)
    return lambda _: constant
