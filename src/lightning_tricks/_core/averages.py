"""How a trick finds an average of the weights that another callback keeps, whatever kind of average that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning_tricks.errors import TrickConflictError, TrickError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lightning_tricks._core.lightning import Trainer

__all__ = ["KeepsAverage", "find_average"]


@runtime_checkable
class KeepsAverage(Protocol):
    """What every callback can do that averages weights."""

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with averaged weights, as copies; the raw ones where no average has begun."""

    def _catch_up(self, trainer: Trainer) -> None:
        """Make the updates that are due after this batch, if its own hook is yet to be called."""


def find_average(callbacks: Iterable[object], *, trick: str) -> KeepsAverage:
    """Return the only callback that averages weights.

    Raises:
        TrickError: If there is none.
        TrickConflictError: If there are several.
    """
    found = [callback for callback in callbacks if isinstance(callback, KeepsAverage)]
    if not found:
        msg = (
            f"{trick} takes averaged weights, and no callback of this Trainer averages any. Add one that leaves the evaluation to the "
            "ensemble, such as `EMA(evaluate=False)`, or pass `weights='current'`."
        )
        raise TrickError(msg)
    if len(found) > 1:
        msg = f"{trick} takes averaged weights, and both {found[0]!r} and {found[1]!r} average some. Keep one."
        raise TrickConflictError(msg)
    return found[0]
