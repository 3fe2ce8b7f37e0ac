"""Student's paired test and Holm's rule, slow and literal."""

from __future__ import annotations

import math


def density(t: float, freedom: int) -> float:
    """Student's density."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)


def tail(t: float, freedom: int, steps: int = 20000) -> float:
    """The probability beyond t ≥ 0, by Simpson's rule from 0 to t."""
    width = t / steps
    inner = sum((4 if i % 2 else 2) * density(i * width, freedom) for i in range(1, steps))
    return 0.5 - width / 3 * (density(0, freedom) + inner + density(t, freedom))


def paired(values: list[float], baselines: list[float]) -> tuple[float, float, float, float]:
    """Return mean difference, the ends of its 95 % interval, and p."""
    n = len(values)
    d = [values[i] - baselines[i] for i in range(n)]
    mean = sum(d) / n
    s = math.sqrt(sum((each - mean) ** 2 for each in d) / (n - 1))
    error = s / math.sqrt(n)
    low, high = 0.0, 1000.0
    while high - low > 1e-9:  # the quantile, by halving
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, n - 1) > 0.025 else (low, middle)
    return mean, mean - low * error, mean + low * error, 2 * tail(abs(mean) / error, n - 1)


def holm(p_values: list[float]) -> list[float]:
    """Multiply the smallest p by m, the next by m − 1, …; none is less than one before it, none more than 1."""
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    corrected = [0.0] * m
    for j, i in enumerate(order):
        corrected[i] = max(min(1.0, (m - k) * p_values[order[k]]) for k in range(j + 1))
    return corrected
