"""Which callbacks cannot share a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_tricks._core.lightning import is_averaging_callback, is_pruning_callback
from lightning_tricks.errors import TrickConflictError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_tricks._core.lightning import Callback

__all__ = ["check_conflicts"]


def check_conflicts(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that would corrupt each other's work.

    Two tricks may not share a state key, since their checkpoints and logs would collide. Only one callback, Lightning's own
    included, may replace the weights used for evaluation, and only one the statistics of normalization layers; Lightning's averages
    replace both. What a trick follows from step to step, no other callback may replace. Only one callback may take over
    `configure_optimizers`, and only one may set learning rates.

    Raises:
        TrickConflictError: Naming both callbacks and the way out.
    """
    callbacks = list(callbacks)
    _check_only_one(callbacks, "configures_optimizers", "take over `configure_optimizers`. Keep one.")
    _check_only_one(callbacks, "sets_rates", "set the learning rates. Keep one, or pass `schedule=None` to one.")
    keys: dict[str, Callback] = {}
    for callback in callbacks:
        if not hasattr(callback, "evaluation_owner"):
            continue
        if (key := callback.state_key) in keys:
            msg = f"{keys[key]!r} and {callback!r} would write to the same place in logs and checkpoints. Give one of them a `name`."
            raise TrickConflictError(msg)
        keys[key] = callback
    followers = [callback for callback in callbacks if getattr(callback, "follows_weights", False)]
    pruning = [callback for callback in callbacks if is_pruning_callback(callback)]
    if followers and pruning:
        other = f"Lightning's {type(pruning[0]).__name__}"
        msg = f"{other} replaces parameters during the fit, and {followers[0]!r} follows them. Remove one of the two."
        raise TrickConflictError(msg)
    owners = [callback for callback in callbacks if getattr(callback, "evaluation_owner", False)]
    foreign = [callback for callback in callbacks if is_averaging_callback(callback)]
    if len(owners) > 1:
        msg = f"{owners[0]!r} and {owners[1]!r} both replace the weights used for evaluation. Keep one, or pass `evaluate=False` to one."
        raise TrickConflictError(msg)
    if owners and foreign:
        other = f"Lightning's {type(foreign[0]).__name__}"
        msg = f"{owners[0]!r} and {other} both replace the weights used for evaluation. Keep one, or pass `evaluate=False` to the former."
        raise TrickConflictError(msg)
    measuring = [callback for callback in callbacks if getattr(callback, "replaces_statistics", False)]
    if len(measuring) > 1:
        first, second = measuring[:2]
        msg = (
            f"{first!r} and {second!r} both replace the statistics of normalization layers used for evaluation. Keep one, or pass "
            "`buffers='copy'` to an average."
        )
        raise TrickConflictError(msg)
    if measuring and foreign:
        other = f"Lightning's {type(foreign[0]).__name__}"
        msg = f"{measuring[0]!r} and {other} both replace the statistics of normalization layers used for evaluation. Keep one."
        raise TrickConflictError(msg)


def _check_only_one(callbacks: Iterable[Callback], capability: str, words: str) -> None:
    having = [callback for callback in callbacks if getattr(callback, capability, False)]
    if len(having) > 1:
        msg = f"{having[0]!r} and {having[1]!r} both {words}"
        raise TrickConflictError(msg)
