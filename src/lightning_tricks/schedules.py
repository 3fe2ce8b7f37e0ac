"""Numbers that vary over training: learning rates, and whatever argument may be a `Schedule`.

Every schedule is a frozen dataclass that prints as its constructor call, pickles, and can be written in YAML.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Final

from typing_extensions import override

from lightning_tricks._core.checks import check_count
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.plateau import ReduceOnPlateau
from lightning_tricks._core.schedule import Schedule
from lightning_tricks.errors import ArgumentError

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "Linear",
    "OneCycle",
    "Polynomial",
    "ReduceOnPlateau",
    "Schedule",
    "Step",
]

_ROUNDING: Final = 1e-9  # of periods that are shares of a fit


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """One value throughout; with `warmup`, the warm-up alone: ``v = level``.

    Args:
        level: The value.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [Constant(0.5, warmup=3).value(step) for step in range(5)]
        [0.125, 0.25, 0.375, 0.5, 0.5]
    """

    levels: ClassVar = ("level",)

    level: float = 1.0

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        return self.level


@dataclass(frozen=True, repr=False)
class _Way(Schedule):
    """From one value to another, which it keeps from `stop` on."""

    levels: ClassVar = ("initial", "final")
    spans: ClassVar = ("stop",)

    initial: float = 1.0
    _: KW_ONLY
    final: float = 0.0
    stop: int | str = "100%"

    @override
    def beginning(self, spans: Mapping[str, float]) -> float:
        return self.initial

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        length = spans["stop"] - spans["warmup"]
        return self.final + (self.initial - self.final) * self._rest(step / length if step < length else 1.0)

    @abstractmethod
    def _rest(self, share: float) -> float:
        """Return how much of the way is left after a share of the time."""


@dataclass(frozen=True, repr=False)
class Linear(_Way):
    """A straight line from `initial` to `final`: ``v = final + (initial − final)·(1 − s/T)``.

    Here s counts the steps since the end of the warm-up, and T is their number at `stop`.

    Args:
        initial: The value after the warm-up.
        final: The value at `stop` and afterwards.
        stop: Moment at which the final value is reached.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [Linear(0.0, final=0.5).value(step, steps=4) for step in range(5)]
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """

    @override
    def _rest(self, share: float) -> float:
        return 1 - share


@dataclass(frozen=True, repr=False, kw_only=True)
class Polynomial(_Way):
    """A power of the time left: ``v = final + (initial − final)·(1 − s/T)^power``.

    Here s counts the steps since the end of the warm-up, and T is their number at `stop`.

    Args:
        initial: The value after the warm-up.
        power: The exponent, above 0; at 1 the curve is `Linear`.
        final: The value at `stop` and afterwards.
        stop: Moment at which the final value is reached.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        L.-C. Chen, G. Papandreou, I. Kokkinos, K. Murphy and A. L. Yuille, "DeepLab: Semantic Image Segmentation with Deep
        Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", IEEE Transactions on Pattern Analysis and Machine
        Intelligence, 2018, for its use with ``power=0.9``.

    Example:
        >>> [Polynomial(power=2).value(step, steps=4) for step in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    power: float = 0.9

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("power", "(0, ∞)")

    @override
    def _rest(self, share: float) -> float:
        return float((1 - share) ** self.power)


@dataclass(frozen=True, repr=False)
class Cosine(_Way):
    """Half a wave from `initial` to `final`: ``v = final + (initial − final)·(1 + cos(π·s/T))/2``.

    Here s counts the steps since the end of the warm-up, and T is their number at `stop`.

    Args:
        initial: The value after the warm-up.
        final: The value at `stop` and afterwards.
        stop: Moment at which the final value is reached.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        I. Loshchilov and F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR, 2017; this is their curve without
        restarts.

    Example:
        >>> [round(Cosine(warmup=2).value(step, steps=6), 3) for step in range(7)]
        [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    @override
    def _rest(self, share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, repr=False, kw_only=True)
class CosineRestarts(Schedule):
    """Half waves from `initial` to `final`, one after another: ``v = final + (initial − final)·(1 + cos(π·c/P))/2``.

    Here c counts the steps since the latest restart. The period P begins as `every` and is multiplied by `growth` at each restart.

    Args:
        initial: The value after the warm-up and after each restart.
        every: Duration of the first period. A share of the fit divides it exactly, so that ``every="20%"`` gives five equal periods.
        final: The value that each period goes to.
        growth: Whole factor by which each period is longer than the one before.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        I. Loshchilov and F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR, 2017.

    Example:
        >>> [round(CosineRestarts(every=2, growth=2).value(step), 3) for step in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """

    levels: ClassVar = ("initial", "final")
    spans: ClassVar = ("every",)

    initial: float = field(default=1.0, kw_only=False)
    every: int | str
    final: float = 0.0
    growth: int = 1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("growth", check_count("growth", self.growth))

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        begin, period = 0.0, spans["every"]
        if self.growth == 1:
            begin = _periods(step, period) * period
        while step >= begin + period - _ROUNDING:
            begin, period = begin + period, period * self.growth
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * (step - begin) / period)) / 2


@dataclass(frozen=True, repr=False)
class _Powers(Schedule):
    """Powers of a factor."""

    levels: ClassVar = ("initial",)
    spans: ClassVar = ("every",)

    initial: float = 1.0
    _: KW_ONLY
    factor: float = 0.1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("factor", "(0, ∞)")

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        limit = self.initial if self.factor == 1 else 0.0 if self.factor < 1 else math.copysign(math.inf, self.initial)
        return min(self.initial, limit), max(self.initial, limit)


@dataclass(frozen=True, repr=False, kw_only=True)
class Exponential(_Powers):
    """Decay by a factor per period, a little at each step: ``v = initial · factor^(s/P)``.

    Here s counts the steps since the end of the warm-up, and P is the period `every`.

    Args:
        initial: The value after the warm-up.
        factor: What the value is multiplied by over a period, above 0.
        every: Duration P of a period.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> [round(Exponential(factor=0.25, every=2).value(step), 4) for step in range(5)]
        [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    factor: float = 0.97
    every: int | str = "1 epoch"

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        return float(self.initial * self.factor ** (step / spans["every"]))


@dataclass(frozen=True, repr=False, kw_only=True)
class Step(_Powers):
    """Steps down, by a factor at a time: ``v = initial · factor^k`` after k of them.

    Args:
        initial: The value after the warm-up.
        factor: What the value is multiplied by each time, above 0.
        every: Duration between two times, from the end of the warm-up; this or `at`.
        at: Moments of the fit, in any order, such as ``("50%", "75%")``; this or `every`.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain, or not exactly one of `every` and `at` is given.

    Example:
        >>> [Step(factor=0.5, every=2).value(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
        >>> [Step(factor=0.5, at=["50%", 5]).value(step, steps=6) for step in range(6)]
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
    """

    every: int | str | None = None
    at: Sequence[int | str] = ()

    @override
    def __post_init__(self) -> None:
        if isinstance(self.at, str) or not isinstance(self.at, Sequence):
            msg = f"`at` must be a list of moments, such as ['50%', '75%'], got {self.at!r}."
            raise ArgumentError(msg)
        if (self.every is None) == (not self.at):
            msg = f"Exactly one of `every` and `at` must say when to step, got every={self.every!r} and at={self.at!r}."
            raise ArgumentError(msg)
        super().__post_init__()
        self._set("at", tuple(plain_duration(moment) for moment in self.at))

    @override
    def _durations(self) -> dict[str, Duration]:
        moments = {f"at[{i}]": Duration.parse(f"at[{i}]", moment) for i, moment in enumerate(self.at)}
        return {**super()._durations(), **moments}

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        if self.every is not None:
            times = _periods(step, spans["every"])
        else:
            times = sum(step + spans["warmup"] >= spans[f"at[{i}]"] - _ROUNDING for i in range(len(self.at)))
        return float(self.initial * self.factor**times)


@dataclass(frozen=True, repr=False, kw_only=True)
class OneCycle(Schedule):
    """Up from `initial` to `peak` and down to `final`, along half waves.

    With R steps to `rise` and T to `stop`, the value is ``initial + (peak − initial)·(1 − cos(π·s/(R − 1)))/2`` for the first R steps,
    and ``final + (peak − final)·(1 + cos(π·(s − R + 1)/(T − R)))/2`` for the others: the last step is taken with `final`.

    Args:
        peak: The greatest value. As a learning-rate schedule, 1 stands for each group's base rate.
        initial: The value of the first step.
        final: The value of the last step, and of those after `stop`.
        rise: Moment before which the peak is reached.
        stop: Moment before which the final value is reached.
        warmup: Duration W over which the value grows as ``(t + 1)/(W + 1)``, before the cycle begins; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        L. N. Smith and N. Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018. Defaults
        and curve are those of torch's ``OneCycleLR``; unlike the paper and torch it leaves the momentum alone.

    Example:
        >>> [round(OneCycle(rise="40%").value(step, steps=5), 3) for step in range(5)]
        [0.04, 1.0, 0.75, 0.25, 0.0]
    """

    levels: ClassVar = ("peak", "initial", "final")
    spans: ClassVar = ("rise", "stop")

    peak: float = field(default=1.0, kw_only=False)
    initial: float = 0.04
    final: float = 4e-6
    rise: int | str = "30%"
    stop: int | str = "100%"

    @override
    def beginning(self, spans: Mapping[str, float]) -> float:
        return self.after_warmup(0, spans) if spans["warmup"] + 1 < spans["stop"] else self.peak

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        top, bottom = (spans[name] - spans["warmup"] - 1 for name in ("rise", "stop"))
        if step < top:
            return self.peak + (self.initial - self.peak) * (1 + math.cos(math.pi * step / top)) / 2
        if step < bottom:
            return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * (step - top) / (bottom - top))) / 2
        return self.final


def _periods(step: int, period: float) -> int:
    """Return how many whole periods fit into a number of steps."""
    return math.floor(step / period + _ROUNDING)
