"""Which layers are BatchNorm with statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tricks._core.selection import matches, nothing_left
from lightning_tricks._core.strategies import plain_name
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["select_batch_norms"]


def select_batch_norms(model: nn.Module, where: str | Sequence[str], exclude: str | Sequence[str], *, trick: str) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name.

    Raises:
        NothingMatchedError: If there are none.
    """
    everything = {plain_name(name): child for name, child in model.named_modules() if isinstance(child, _BatchNorm)}
    tracking = {name: norm for name, norm in everything.items() if norm.running_mean is not None}
    located = {name: norm for name, norm in tracking.items() if matches(name, where)}
    selected = {name: norm for name, norm in located.items() if not matches(name, exclude)}
    if selected:
        return selected
    kind = type(model).__name__
    if not everything:
        reason = f"{kind} has no BatchNorm of any kind. Leave {trick} out, which other layers do not need"
    elif not tracking:
        reason = f"all {len(everything)} of {kind} have `track_running_stats=False`. Leave {trick} out, which they do not need"
    else:
        reason = nothing_left(model, tracking, located, where, exclude)
    msg = f"{trick} found no BatchNorm with running statistics: {reason}."
    raise NothingMatchedError(msg)
