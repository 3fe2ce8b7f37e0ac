"""Grids of round numbers: evenly spaced in the logarithm, and written as one would write them by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks.errors import ArgumentError

__all__ = ["linear_grid", "log_grid"]


def log_grid(low: float, high: float, count: int) -> list[float]:
    r"""Return values from `low` to `high`, evenly spaced in the logarithm, and rounded to the conventional ones.

    ``x_i = low · (high / low)^(i / (count − 1))``, ``i = 0, …, count − 1``. The ends stay as they are. Each value between them is
    rounded to the nearest of few significant digits, nearest by ratio: between neighbours ``a < b`` the border is ``√(ab)``, which
    itself goes to ``a``. All values have the same number of digits, the smallest that keeps them apart: one digit as a rule, which gives
    1, 3, 10 and 1, 2, 5, 10. The arithmetic is exact, so that the results equal the literals one would type.

    Args:
        low: The first value, in (0, ∞).
        high: The last value, larger than `low`.
        count: How many values there are, at least 2.

    Raises:
        ArgumentError: If an argument lies outside its domain, or there are fewer numbers between `low` and `high` than asked for.

    Example:
        >>> from lightning_tricks.search import log_grid
        >>> log_grid(0.001, 0.01, 3), log_grid(0.001, 0.01, 4)
        ([0.001, 0.003, 0.01], [0.001, 0.002, 0.005, 0.01])
        >>> log_grid(1e-4, 1, 5)
        [0.0001, 0.001, 0.01, 0.1, 1.0]
        >>> log_grid(1, 10, 7)  # one digit would not tell 1.5 from 1 or 2
        [1.0, 1.5, 2.2, 3.2, 4.6, 6.8, 10.0]
    """
    check_in_interval("low", low, "(0, ∞)")
    first, last, steps = *_ends(low, high), check_count("count", count, least=2) - 1
    for digits in range(1, 18):  # 17 tell any two floats apart
        values = [float(low), *(float(_round(first, last / first, i, steps, digits)) for i in range(1, steps)), float(high)]
        if all(before < after for before, after in itertools.pairwise(values)):
            return values
    msg = f"`count` must be at most what fits between `low` and `high`, got {count} values from {low!r} to {high!r}."
    raise ArgumentError(msg)


def linear_grid(low: float, high: float, count: int) -> list[float]:
    """Return evenly spaced values from `low` to `high`: exact for decimals, so that 0.1 to 0.3 has 0.2 between them."""
    first, last, steps = *_ends(low, high), check_count("count", count, least=2) - 1
    return [float(first + (last - first) * i / steps) for i in range(steps + 1)]


def _ends(low: float, high: float) -> tuple[Fraction, Fraction]:
    check_in_interval("low", low, "(-∞, ∞)")
    check_in_interval("high", high, "(-∞, ∞)")
    if not low < high:
        msg = f"`low` must be smaller than `high`, got {low!r} and {high!r}."
        raise ArgumentError(msg)
    return Fraction(repr(float(low))), Fraction(repr(float(high)))  # the decimals that were written


def _round(first: Fraction, ratio: Fraction, i: int, steps: int, digits: int) -> Fraction:
    """Round ``x = first · ratio^(i / steps)`` to the nearest of some digits, by ratio; without a root, and so without an error."""
    power = ratio**i
    estimate = math.log10(first) + i / steps * math.log10(ratio)
    unit = Fraction(10) ** (math.floor(estimate) - digits + 1)
    below = math.floor(10 ** (estimate - math.floor(estimate) + digits - 1))
    while (below * unit / first) ** steps > power:  # the estimate is off by one at most
        below -= 1
    while ((below + 1) * unit / first) ** steps <= power:
        below += 1
    border = (below * (below + 1) * (unit / first) ** 2) ** steps  # x² compared with the product of its neighbours
    return (below if power**2 <= border else below + 1) * unit
