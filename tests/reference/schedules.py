"""Every schedule as its formula is written, step by step, without regard for speed or for steps outside the fit.

Steps t are those taken before, W is the number of steps of the warm-up, T the number of steps of the fit.
"""

from __future__ import annotations

from math import cos, pi


def warmed(after, t, W):  # noqa: N803
    """Put a warm-up in front of a function of the steps since its end."""
    if t < W:
        return after(0) * (t + 1) / (W + 1)
    return after(t - W)


def constant(s, level):
    return level


def linear(s, length, initial, final):
    value = initial
    for _ in range(s):
        value += (final - initial) / length
    return value


def polynomial(s, length, initial, final, power):
    left = (length - s) / length
    return final + (initial - final) * left**power


def cosine(s, length, initial, final):
    return final + (initial - final) / 2 * (1 + cos(pi * s / length))


def cosine_restarts(s, period, growth, initial, final):
    since_restart = 0
    for _ in range(s):
        since_restart += 1
        if since_restart == period:
            since_restart, period = 0, period * growth
    return cosine(since_restart, period, initial, final)


def exponential(s, period, initial, factor):
    value = initial
    for _ in range(s):
        value *= factor ** (1 / period)
    return value


def step(s, period, initial, factor):
    value = initial
    for each in range(1, s + 1):
        if each % period == 0:
            value *= factor
    return value


def multi_step(t, moments, initial, factor):
    value = initial
    for moment in moments:
        if t >= moment:
            value *= factor
    return value


def one_cycle(s, rise, length, *, initial, peak, final):
    """Step rise - 1 has the peak, and step length - 1 the final value."""
    if s <= rise - 1:
        return cosine(s, rise - 1, initial, peak)
    return cosine(s - (rise - 1), length - rise, peak, final)


def reduce_on_plateau(metrics, factor, patience, cooldown):
    """Return the factor after each validation, for a metric that is better when smaller by any amount."""
    value, best, bad, rest, values = 1.0, float("inf"), 0, 0, []
    for metric in metrics:
        if metric < best:
            best, bad = metric, 0
        else:
            bad += 1
        if rest > 0:
            rest, bad = rest - 1, 0
        if bad > patience:
            value, bad, rest = value * factor, 0, cooldown
        values.append(value)
    return values
