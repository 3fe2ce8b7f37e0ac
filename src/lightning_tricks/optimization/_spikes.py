"""What makes a value an outlier among the latest ones."""

from __future__ import annotations

from collections import deque
from math import inf, isfinite
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["QUANTITIES", "Quantity", "SpikeWindow", "spike_limit"]

Quantity = Literal["loss", "grad_norm"]
QUANTITIES: Final[tuple[Quantity, ...]] = ("loss", "grad_norm")

_NORMAL: Final = 1.4826  # by which the MAD of normal numbers is their standard deviation
_LEAST: Final = 0.01  # of the median: what the deviation is taken for at least
_ENOUGH: Final = 20  # values, to hold others against


def spike_limit(values: Sequence[float], threshold: float) -> float:
    """Return the largest value that is no outlier: ``m + k · max(1.4826 · MAD, 0.01 · |m|)`` with the median m.

    Example:
        >>> round(spike_limit([1.0, 2.0, 3.0, 4.0, 100.0], threshold=2.0), 4)
        5.9652
    """
    center = median(values)
    deviation = _NORMAL * median(abs(value - center) for value in values)
    return center + threshold * max(deviation, _LEAST * abs(center))


class SpikeWindow:
    """The latest accepted values of each quantity that is watched at the steps of one optimizer.

    Until there are 20 values of a quantity, or as many as its window holds, its limit is infinite. A value of exactly zero says nothing
    of what is usual, as where a step has no gradient, and does not enter.

    Attributes:
        latest: The latest values, accepted or not.
        limits: What they were held against.
    """

    def __init__(self, quantities: Iterable[Quantity], size: int, threshold: float) -> None:
        self._size, self._threshold = size, threshold
        self._values: dict[str, deque[float]] = {quantity: deque(maxlen=size) for quantity in quantities}
        self.latest: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def outliers(self, values: Mapping[str, float]) -> list[str]:
        """Return the quantities of a step that lie above their limit or are not finite."""
        enough = {name: len(window) >= min(self._size, _ENOUGH) for name, window in self._values.items()}
        self.limits = {name: spike_limit(window, self._threshold) if enough[name] else inf for name, window in self._values.items()}
        self.latest = dict(values)
        return [name for name, value in values.items() if not isfinite(value) or value > self.limits[name]]

    def accept(self, values: Mapping[str, float]) -> None:
        """Let the values of a step that was taken be among those that later ones are held against."""
        for name, value in values.items():
            if value:
                self._values[name].append(value)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the values, from the oldest on."""
        return {name: list(window) for name, window in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over the values of quantities that are watched here, too; the latest, where the window is smaller."""
        for name, window in self._values.items():
            window.clear()
            window.extend(state.get(name, ()))
