"""Which arguments the callbacks that collect members accept, beyond those that any callback may have."""

from __future__ import annotations

from typing import Literal

from lightning_tricks.errors import ArgumentError

__all__ = ["check_batches", "check_target"]


def check_target(value: str | None) -> str | None:
    """Accept the name of a submodule, or None."""
    if value is not None and not (isinstance(value, str) and value):
        msg = f"`target` must be the name of a module such as 'net.head', or None for the model's `forward`, got {value!r}."
        raise ArgumentError(msg)
    return value


def check_batches(value: int | Literal["all"] | None) -> int | Literal["all"] | None:
    """Accept a number of batches, all of them, or none."""
    if value is None or value == "all":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"`refresh_batch_norm` must be a number of batches of at least 1, 'all', or None to keep the statistics, got {value!r}."
        raise ArgumentError(msg)
    return value
