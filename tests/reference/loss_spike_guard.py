"""When a step is left out, transcribed literally, without any library and as slow as that is."""

from __future__ import annotations


def median(values: list[float]) -> float:
    """Return the value in the middle, or the mean of the two there."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def is_spike(value: float, accepted: list[float], threshold: float, window: int) -> bool:
    """Tell whether a value is not finite, or larger than m + k · max(1.4826 · MAD, 0.01 · |m|) of the latest accepted ones."""
    if value != value or value in (float("inf"), -float("inf")):  # noqa: PLR0124
        return True
    if len(accepted) < min(window, 20):
        return False
    latest = accepted[max(0, len(accepted) - window) :]
    m = median(latest)
    mad = median([abs(each - m) for each in latest])
    return value > m + threshold * max(1.4826 * mad, 0.01 * abs(m))
