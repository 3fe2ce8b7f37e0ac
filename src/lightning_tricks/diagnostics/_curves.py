"""A picture of quantities over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["draw_curves"]


def draw_curves(path: Path, *, steps: Sequence[float], curves: Mapping[str, Sequence[float]], label: str, title: str = "") -> None:
    """Draw curves in one picture and write a PNG.

    Args:
        path: Where to write.
        steps: Optimizer steps.
        curves: Values at the steps, by their names.
        label: What the values are.
        title: A heading.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    figure_of = require("matplotlib.figure", package="matplotlib", extra="examples", who="A picture of curves").Figure
    figure = figure_of(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(steps, values, label=name.replace("_", " "))
    if len(curves) > 1:
        axes.legend()
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
