"""Scale and shift with which another normalization starts, channel by channel, as the definitions say; slow and literal."""

from __future__ import annotations


def started(mean, variance, weight, bias, *, eps, groups):
    """Return scales and shifts for layers that pool over these groups of channels, each a list of indices.

    BatchNorm gives ``(x − m)/√(v + ε) · w + b`` for a channel. A layer that pools over a group finds the mean and the variance of all its
    values, and gives ``(x − M)/√(V + ε) · w' + b'``. The two are the same function of x.
    """
    scales, shifts = [0.0] * len(mean), [0.0] * len(mean)
    for group in groups:
        centre = sum(mean[c] for c in group) / len(group)
        spread = sum(variance[c] + (mean[c] - centre) ** 2 for c in group) / len(group)
        for c in group:
            slope = weight[c] / (variance[c] + eps) ** 0.5
            scales[c] = slope * (spread + eps) ** 0.5
            shifts[c] = bias[c] - slope * mean[c] + slope * centre
    return scales, shifts


def started_about_zero(mean, variance, weight, bias, *, eps, groups):
    """The same for layers that divide by the root of the mean square and subtract nothing."""
    scales, shifts = [0.0] * len(mean), [0.0] * len(mean)
    for group in groups:
        square = sum(variance[c] + mean[c] ** 2 for c in group) / len(group)
        for c in group:
            slope = weight[c] / (variance[c] + eps) ** 0.5
            scales[c] = slope * (square + eps) ** 0.5
            shifts[c] = bias[c] - slope * mean[c]
    return scales, shifts
