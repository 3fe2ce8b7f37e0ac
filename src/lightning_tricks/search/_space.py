"""What a search varies: ranges and choices, each at a path of the configuration; drawn, put on a grid, and zoomed into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_tricks._core.checks import check_choice, check_in_interval
from lightning_tricks.errors import ArgumentError
from lightning_tricks.search._configuration import Path_
from lightning_tricks.search._grid import linear_grid, log_grid

__all__ = ["Choice", "Parameter", "Point", "Range", "active", "grid", "read_parameter", "suggest", "zoom"]

Point = dict[str, Any]
"""Values by path."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both of which belong to it.

    Attributes:
        path: Where they go in the configuration.
        place: The same as keys and indices.
        low: The lower bound.
        high: The upper bound.
        scale: Whether differences or ratios count.
        whole: Whether they are whole numbers.
    """

    path: str
    place: Path_
    low: float
    high: float
    scale: Literal["linear", "log"]
    whole: bool

    def size(self, count: int) -> int:
        """Return how many values a grid has at most."""
        return int(min(count, self.high - self.low + 1)) if self.whole else count

    def grid(self, count: int, *, inside: bool) -> list[float]:
        """Return `count` values, or fewer whole ones where there are not as many; `inside`: without the bounds, which are known.

        A single value is the one in the middle.
        """
        if self.low == self.high:
            return [self.low]
        spread, inside = log_grid if self.scale == "log" else linear_grid, inside or count == 1
        values: list[float] = spread(self.low, self.high, count + 2 if inside else count)
        if self.whole:
            values = sorted({min(max(round(value), self.low), self.high) for value in values})
        return (values[1:-1] or values)[:count] if inside else values

    def suggest(self, trial: Any) -> float:
        """Let Optuna's sampler choose."""
        ask = trial.suggest_int if self.whole else trial.suggest_float
        value: float = ask(self.path, self.low, self.high, log=self.scale == "log")
        return value

    def zoomed(self, tried: Sequence[float], best: Sequence[float]) -> Range:
        """Return the range from the value tried next below the best ones to that next above; its own bounds where there is none."""
        if not best:
            return self
        low = max((value for value in tried if value < min(best)), default=self.low)
        high = min((value for value in tried if value > max(best)), default=self.high)
        return replace(self, low=low, high=high)


@dataclass(frozen=True)
class Choice:
    """Some values, one of which is taken.

    Attributes:
        path: Where it goes in the configuration.
        place: The same as keys and indices.
        values: Those that are left.
        all: All that there were at first.
    """

    path: str
    place: Path_
    values: tuple[Any, ...]
    all: tuple[Any, ...]

    @property
    def switches(self) -> bool:
        """Whether it takes an item of a list in and out."""
        return isinstance(self.place[-1], int)

    def size(self, count: int) -> int:
        """Return how many values there are."""
        return len(self.values)

    def grid(self, count: int, *, inside: bool) -> list[Any]:
        """Return all values that are left."""
        return list(self.values)

    def suggest(self, trial: Any) -> Any:
        """Let Optuna's sampler choose, among all: its storages do not let choices change."""
        return trial.suggest_categorical(self.path, self.all)

    def zoomed(self, tried: Sequence[Any], best: Sequence[Any]) -> Choice:
        """Return what the best ones have of it."""
        left = tuple(value for value in self.values if any(value is each or value == each for each in best))
        return replace(self, values=left or self.values)


Parameter = Range | Choice


def read_parameter(path: str, place: Path_, given: Any) -> Parameter:
    """Make a parameter of what a configuration of a search says: a list of choices, or a mapping with bounds.

    Raises:
        ArgumentError: If it is neither, or its bounds are wrong.
    """
    if isinstance(given, list):
        plain = all(value is None or isinstance(value, str | int | float) for value in given)
        if len(given) < 2 or not plain or len({(type(value), value) for value in given}) < len(given):
            msg = f"`{path}` must be a list of at least two different numbers, texts, `true`, `false` or `null`, got {given!r}."
            raise ArgumentError(msg)
        if isinstance(place[-1], int) and not all(isinstance(value, bool) for value in given):
            msg = f"`{path}` is an item of a list, which can be there or not: it must be `[true, false]`, got {given!r}."
            raise ArgumentError(msg)
        return Choice(path, place, tuple(given), tuple(given))
    if not isinstance(given, Mapping) or not {"low", "high"} <= given.keys() <= {"low", "high", "scale"}:
        msg = f"`{path}` must be a list of choices, or a mapping with `low`, `high` and possibly `scale`, got {given!r}."
        raise ArgumentError(msg)
    scale = check_choice("scale", given.get("scale", "linear"), ("linear", "log"))
    low, high = (check_in_interval(name, given[name], "(0, ∞)" if scale == "log" else "(-∞, ∞)") for name in ("low", "high"))
    if not low < high:
        msg = f"`low` must be smaller than `high`, got {low!r} and {high!r}."
        raise ArgumentError(msg)
    return Range(path, place, low, high, scale, isinstance(given["low"], int) and isinstance(given["high"], int))


def active(space: Iterable[Parameter], point: Mapping[str, Any]) -> Point:
    """Leave out of a point what belongs to items that the point takes out."""
    space = list(space)
    out = [each.place for each in space if isinstance(each, Choice) and each.switches and point.get(each.path) is False]
    return {each.path: point[each.path] for each in space if each.path in point and not _under(each.place, out)}


def suggest(space: Sequence[Parameter], trial: Any) -> Point:
    """Let Optuna's sampler choose a point: first what takes items in and out, then the arguments of those that are in."""
    point: Point = {}
    for each in sorted(space, key=lambda each: not (isinstance(each, Choice) and each.switches)):
        if each.path in active(space, {**point, each.path: None}):
            point[each.path] = each.suggest(trial)
    return active(space, point)


def grid(space: Sequence[Parameter], count: int, *, inside: bool, limit: int = 10_000) -> list[Point]:
    """Return all combinations of all values, each once.

    Raises:
        ArgumentError: If there are more than a limit.
    """
    if (total := math.prod(each.size(count) for each in space)) > limit:
        msg = f"A grid must have at most {limit:,} points, got {total:,}. Take fewer values, or draw them with the sampler 'random'."
        raise ArgumentError(msg)
    axes = [each.grid(count, inside=inside) for each in space]
    points = [active(space, dict(zip([each.path for each in space], values, strict=True))) for values in itertools.product(*axes)]
    return list({tuple(map(repr, point.items())): point for point in points}.values())


def zoom(space: Sequence[Parameter], tried: Sequence[Point], best: Sequence[Point]) -> list[Parameter]:
    """Return the part of a space around the best points: ranges between their neighbours, and the choices that they have."""

    def of(path: str, points: Sequence[Point]) -> list[Any]:
        return [point[path] for point in points if path in point]

    return [each.zoomed(of(each.path, tried), of(each.path, best)) for each in space]


def _under(place: Path_, out: Sequence[Path_]) -> bool:
    return any(len(place) > len(each) and place[: len(each)] == each for each in out)
