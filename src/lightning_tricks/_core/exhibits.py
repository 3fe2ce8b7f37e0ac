"""What a trick hands to whoever keeps a record of a run, whichever trick and whichever record that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

__all__ = ["GOALS", "Exhibits", "Goal", "Table", "WeightFiles"]

Goal = Literal["min", "max", "mean", "first", "last"]
"""Which of all values of a metric stands for the whole run."""
GOALS: Final = get_args(Goal)


@dataclass(frozen=True)
class Table:
    """Rows of plain values.

    Attributes:
        columns: What the columns are called.
        rows: A value, or None, for each column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class WeightFiles:
    """Weights in files that stay as they are.

    Attributes:
        alias: What tells them from others of the same trick.
        paths: The files.
        facts: What is known of them.
    """

    alias: str
    paths: tuple[Path, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Exhibits:
    """What there is to show of a trick, beside its arguments and what it logs. All of it can be had on one rank, without the others.

    Attributes:
        goals: What stands for the run of the metrics that it logs, by their names after ``<trick>/``; otherwise the last value does.
        asides: Prefixes under which it lets the module's own metrics be logged once more.
        facts: What it has found, in plain values by name; names here and below are none of its metrics.
        tables: The same in tables.
        figures: What it can draw, by name: each writes a PNG.
        members: Weights that it has stored beside checkpoints.
        weights: What a checkpoint that is written now has as its ``state_dict``; None if the trick has no part in that.
    """

    goals: Mapping[str, Goal] = field(default_factory=dict)
    asides: tuple[str, ...] = ()
    facts: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    members: tuple[WeightFiles, ...] = ()
    weights: Literal["averaged"] | None = None
