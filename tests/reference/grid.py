"""A grid in the logarithm, rounded by trying every number of so many digits."""

from __future__ import annotations

from fractions import Fraction


def log_grid(low: str, high: str, count: int) -> list[Fraction]:
    """Take the ends as decimals in print; the distance of ``v`` from ``x`` is ``max(x / v, v / x)``, to a power that makes it rational."""
    first, last, steps = Fraction(low), Fraction(high), count - 1
    digits = 0
    while True:
        digits += 1
        candidates = []
        for exponent in range(-30, 30):
            for mantissa in range(10 ** (digits - 1), 10**digits):
                value = mantissa * Fraction(10) ** (exponent - digits + 1)
                if first / 10 <= value <= last * 10:
                    candidates.append(value)
        values = [first]
        for i in range(1, steps):
            power = first**steps * (last / first) ** i  # x to the power of the number of steps
            best = None
            for value in candidates:
                distance = max(power / value**steps, value**steps / power)
                if best is None or distance < best[0]:
                    best = (distance, value)
            values.append(best[1])
        values.append(last)
        if sorted(set(values)) == values:
            return values
