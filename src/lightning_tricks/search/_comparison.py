"""Paired comparisons over seeds: mean difference, its 95 % interval, and p-values that know how many questions were asked.

Two runs of one seed share initial weights and the order of the data, and with them much of the chance in their results. Their difference
has less of it than either, so that few seeds say more than two unpaired means would.

Source: Student, "The Probable Error of a Mean", Biometrika, 1908. S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
Scandinavian Journal of Statistics, 1979.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Difference", "compare_pairs", "holm"]


class Difference(NamedTuple):
    """A mean difference, and what is known of it.

    Attributes:
        mean: The mean of the differences.
        low: Lower end of its 95 % interval; NaN for a single pair.
        high: Upper end.
        p_value: Probability of a mean at least as far from 0 where there is no difference; NaN for a single pair.
        pairs: How many pairs there are.
    """

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int


def compare_pairs(values: Sequence[float], baselines: Sequence[float]) -> Difference:
    r"""Compare paired values by Student's t: ``d̄ ± t_{0.975, n−1} s/√n`` of the differences ``d = value − baseline``.

    Pairs of which one is NaN are left out. Where all differences are equal, the interval is a point, and p is 1 if they are 0, else 0.

    Args:
        values: One value for each seed.
        baselines: Those of the same seeds, in the same order.

    Raises:
        MissingPackageError: If SciPy is not installed.
    """
    differences = [value - base for value, base in zip(values, baselines, strict=True) if math.isfinite(value) and math.isfinite(base)]
    count = len(differences)
    mean = statistics.fmean(differences) if differences else math.nan
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    student = require("scipy.stats", package="scipy", extra="search", who="A paired comparison").t(df=count - 1)
    reach = error * float(student.ppf(0.975))
    return Difference(mean, mean - reach, mean + reach, 2 * float(student.sf(abs(mean) / error)), count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down rule: ``p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j))``.

    The probability that any true null hypothesis is rejected stays at the level chosen, whatever depends on what. NaNs stay, and count for
    nothing.

    Args:
        p_values: The p-values of m questions.
    """
    asked = sorted((p_value, index) for index, p_value in enumerate(p_values) if not math.isnan(p_value))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p_value, index) in enumerate(asked):
        largest = max(largest, min(1.0, (len(asked) - rank) * p_value))
        corrected[index] = largest
    return corrected
