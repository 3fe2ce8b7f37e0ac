"""Grids of round numbers: evenly spaced in the logarithm, and written as one would write them by hand."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks.errors import ArgumentError

__all__ = ["linear_grid", "log_grid"]

_DIGITS = 60
_ERROR = Decimal("1e-50")


def log_grid(low: float, high: float, count: int) -> list[float]:
    r"""Return values from `low` to `high`, evenly spaced in the logarithm, and rounded to the conventional ones.

    ``x_i = low · (high / low)^(i / (count − 1))``, ``i = 0, …, count − 1``. The ends stay as they are. Each value between them is
    rounded to the nearest of few significant digits, nearest by ratio: between neighbours ``a < b`` the border is ``√(ab)``, which
    itself goes to ``a``. All values have the same number of digits, the smallest that keeps them apart: one digit as a rule, which gives
    1, 3, 10 and 1, 2, 5, 10. The arithmetic is decimal, so that the results equal the literals one would type.

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
    with localcontext(prec=_DIGITS):
        exact = [first * (i * (last / first).ln() / steps).exp() for i in range(1, steps)]
        for digits in range(1, 18):  # 17 tell any two floats apart
            values = [float(low), *(float(_round(value, digits)) for value in exact), float(high)]
            if all(before < after for before, after in itertools.pairwise(values)):
                return values
    msg = f"`count` must be at most what fits between `low` and `high`, got {count} values from {low!r} to {high!r}."
    raise ArgumentError(msg)


def linear_grid(low: float, high: float, count: int) -> list[float]:
    """Return evenly spaced values from `low` to `high`: exact for decimals, so that 0.1 to 0.3 has 0.2 between them."""
    first, last, steps = *_ends(low, high), check_count("count", count, least=2) - 1
    with localcontext(prec=_DIGITS):
        return [float(first + (last - first) * i / steps) for i in range(steps + 1)]


def _ends(low: float, high: float) -> tuple[Decimal, Decimal]:
    check_in_interval("low", low, "(-∞, ∞)")
    check_in_interval("high", high, "(-∞, ∞)")
    if not low < high:
        msg = f"`low` must be smaller than `high`, got {low!r} and {high!r}."
        raise ArgumentError(msg)
    return Decimal(repr(float(low))), Decimal(repr(float(high)))  # the decimals that were written


def _round(value: Decimal, digits: int) -> Decimal:
    """Round to the nearest of some digits, by ratio; the error of the last digits of a value decides nothing."""
    unit = Decimal(10) ** (value.adjusted() - digits + 1)
    below = value // unit
    border = below * (below + 1) * unit**2  # the product of the neighbours, which is compared with the square
    return (below if value**2 <= border * (1 + _ERROR) else below + 1) * unit
