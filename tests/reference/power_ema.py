"""Power-function averages and their synthesis as the paper's equations say it, step by step and by quadrature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def gamma_of(sigma_rel: float) -> float:
    """Return the largest root of the polynomial that relates the exponent to the width."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return max(root.real for root in roots if abs(root.imag) < 1e-8)


def power_ema(history: Sequence[Tensor], sigma_rel: float, *, every: int = 1) -> Tensor:
    """Average ``history[t]``, the weights after t steps, updating after each step that `every` divides."""
    gamma = gamma_of(sigma_rel)
    average = history[0].double()
    share = 1.0  # of the old average, over the steps since the latest update
    for t in range(1, len(history)):
        share *= (1 - 1 / t) ** (gamma + 1)
        if t % every == 0:
            average = share * average + (1 - share) * history[t].double()
            share = 1.0
    return average


def coefficients(steps: Sequence[int], widths: Sequence[float], sigma_rel: float, *, points: int = 200_000) -> np.ndarray:
    """Return the coefficients that add up to one and bring the sum of sampled profiles nearest to the one of another width."""
    end = max(steps)
    time = (np.arange(points) + 0.5) / points * end

    def profile(t: int, width: float) -> np.ndarray:
        gamma = gamma_of(width)
        return np.where(time <= t, (gamma + 1) * time**gamma / t ** (gamma + 1), 0.0)

    columns = np.stack([profile(t, width) for t in steps for width in widths], axis=1)
    # With x_0 = 1 - x_1 - … the condition is met, and the rest is an ordinary problem.
    rest = np.linalg.lstsq(columns[:, 1:] - columns[:, :1], profile(end, sigma_rel) - columns[:, 0], rcond=None)[0]
    return np.concatenate([[1 - rest.sum()], rest]).reshape(len(steps), len(widths))


def width_of(every: int, steps: int, decay: object) -> float:
    """Return the width of the profile of an average whose updates keep ``decay(t, k)``: t at the update before, k steps ago."""
    average = torch.zeros(2, dtype=torch.float64)  # of the time, and of its square
    for t in range(every, steps + 1, every):
        share = decay(t - every, every)
        average = share * average + (1 - share) * torch.tensor([t, t**2], dtype=torch.float64)
    mean, square = average.tolist()
    return (square - mean**2) ** 0.5 / steps
