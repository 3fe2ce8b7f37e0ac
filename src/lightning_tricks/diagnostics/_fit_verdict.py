"""From the curves of training and validation loss to words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks.errors import ArgumentError

__all__ = ["FitVerdict", "diagnose_fit"]

Kind = Literal["overfitting", "underfitting", "fitted", "diverged", "unclear"]

_REGULARIZE: Final = "Regularize more (WeightDecay, Dropout, StochasticDepth), augment or collect data, or take a smaller model"
_ENLARGE: Final = "Take a larger model, a higher learning rate, or less regularization and augmentation"


@dataclass(frozen=True)
class FitVerdict:
    """What two curves of losses say about a fit.

    Attributes:
        kind: The word for it.
        reason: What was seen.
        advice: What usually helps.

    Example:
        >>> print(FitVerdict("unclear", "only 2 records", "Train longer"))
        unclear: only 2 records. Train longer.
    """

    kind: Kind
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}. {self.advice}."


def diagnose_fit(
    train: Sequence[float], val: Sequence[float], *, goal: float | None = None, patience: int = 3, tolerance: float = 0.01
) -> FitVerdict:
    """Name under- or overfitting from the losses at several moments of one fit.

    With p = `patience`, the latest p records are compared, by their means, with the p before. A curve falls or rises if the
    difference exceeds the share `tolerance` of the earlier mean; otherwise it stands still. The first of these that holds is the verdict:

    1. ``"unclear"``: there are fewer than 2p records;
    2. ``"diverged"``: a latest loss is not finite, or the latest training losses exceed the first one;
    3. ``"overfitting"``: validation loss was lowest at least p records ago, is higher since by more than the tolerance, and training loss
       is lower than it was then;
    4. ``"underfitting"``: both fall, so that longer training helps;
    5. ``"overfitting"``: training loss falls, and validation loss does not;
    6. training loss stands still: with a `goal`, ``"underfitting"`` if it is farther from the goal than validation loss is from
       training loss, and ``"overfitting"`` if not; ``"fitted"`` if both distances are within the tolerance. Without a goal,
       ``"underfitting"`` if more than half of the first record's loss is left, and otherwise ``"fitted"``.

    Args:
        train: Training losses, the earliest first.
        val: Validation losses at the same moments.
        goal: The training loss that is known to be within reach, such as that of people or of an earlier model; None = unknown.
        patience: Records p in each of the two windows, at least 1.
        tolerance: The share below which a change does not count, in [0, ∞).

    Returns:
        The verdict with its reason, and what usually helps.

    Raises:
        ArgumentError: If the curves have different lengths, or an argument lies outside its domain.

    References:
        - I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press, 2016, sections 5.2 and 11.3. Under- and overfitting by
          training error and gap.

        The book defines the terms; windows, tolerance and order of the rules are ours.

    Example:
        >>> diagnose_fit([2.0, 1.5, 1.1, 0.8, 0.6, 0.4], [2.1, 1.7, 1.5, 1.6, 1.8, 2.0]).kind
        'overfitting'
        >>> diagnose_fit([2.0, 1.5, 1.1, 0.8, 0.6, 0.4], [2.1, 1.7, 1.4, 1.2, 1.0, 0.9]).kind
        'underfitting'
    """
    if len(train) != len(val):
        msg = f"`train` and `val` must be losses at the same moments, got {len(train)} and {len(val)} of them."
        raise ArgumentError(msg)
    p, tolerance = check_count("patience", patience), check_in_interval("tolerance", tolerance, "[0, ∞)")
    if len(train) < 2 * p:
        return FitVerdict("unclear", f"{len(train)} records of both losses, and {2 * p} are needed", "Train longer, or validate more often")
    return _of_curves(train, val, goal, p, tolerance)


def _of_curves(train: Sequence[float], val: Sequence[float], goal: float | None, p: int, tolerance: float) -> FitVerdict:
    late, late_val = fmean(train[-p:]), fmean(val[-p:])
    if not (math.isfinite(late) and math.isfinite(late_val)) or late > train[0] + tolerance * abs(train[0]):
        reason = f"training loss is {late:.4g} and validation loss {late_val:.4g} after a first training loss of {train[0]:.4g}"
        return FitVerdict("diverged", reason, "Lower the learning rate, warm it up, or clip gradients; GradientFlow shows where it begins")
    best = min(range(len(val)), key=lambda index: val[index])
    if best < len(val) - p and late_val > val[best] + tolerance * abs(val[best]) and late < train[best]:
        reason = f"validation loss was lowest ({val[best]:.4g}) at record {best + 1} of {len(val)} and is at {late_val:.4g} by now, "
        reason += f"while training loss went from {train[best]:.4g} to {late:.4g}"
        return FitVerdict("overfitting", reason, f"Keep the best checkpoint. {_REGULARIZE}")
    if _falls(train, p, tolerance) and _falls(val, p, tolerance):
        reason = f"training loss ({late:.4g}) and validation loss ({late_val:.4g}) both still fall"
        return FitVerdict("underfitting", reason, "Train longer, or with a higher learning rate")
    if _falls(train, p, tolerance):
        reason = f"training loss ({late:.4g}) still falls, and validation loss ({late_val:.4g}) does not"
        return FitVerdict("overfitting", reason, _REGULARIZE)
    return _of_plateau(train[0], late, late_val, goal, tolerance)


def _of_plateau(first: float, late: float, late_val: float, goal: float | None, tolerance: float) -> FitVerdict:
    stands = f"training loss stands still at {late:.4g}; the gap is {late_val - late:.4g}"
    if goal is None:
        if late > 0.5 * first:
            return FitVerdict("underfitting", f"{stands}; more than half of the first loss {first:.4g} is left", _ENLARGE)
        return FitVerdict("fitted", stands, "Whether the loss is low enough only a `goal` can tell")
    bias, variance = late - goal, late_val - late
    if max(bias, variance) <= tolerance * abs(goal):
        return FitVerdict("fitted", f"{stands}, and the goal {goal:.4g} is reached", "Stop here, or set a lower goal")
    if bias > variance:
        return FitVerdict("underfitting", f"{stands}, and the goal {goal:.4g} is farther away", _ENLARGE)
    return FitVerdict("overfitting", f"{stands}, which is more than what is left to the goal {goal:.4g}", _REGULARIZE)


def _falls(curve: Sequence[float], p: int, tolerance: float) -> bool:
    before, late = fmean(curve[-2 * p : -p]), fmean(curve[-p:])
    return before - late > tolerance * abs(before)
