"""A picture of one quantity over layers and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["draw_heat_map", "need_matplotlib"]

_LINEAR: Final = ("mean", "dead", "saturated")  # which are no magnitudes, and are not shown by their logarithm
_LABELS: Final = 40


def need_matplotlib(who: str) -> Any:
    """Return the module of matplotlib's figures.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    return require("matplotlib.figure", package="matplotlib", extra="examples", who=who)


def draw_heat_map(table: Tensor, layers: Sequence[str], steps: Sequence[int], quantity: str, path: Path) -> None:
    """Draw layers by steps and write a PNG; layers without a value are left out, and cells without one are grey.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    shown = [row for row in range(len(layers)) if not bool(table[row].isnan().all())]
    values = table[shown].double()
    if quantity not in _LINEAR:
        values = values.log10()
    values[~values.isfinite()] = float("nan")
    names = [layers[row] for row in shown]
    figure = need_matplotlib("The heat map").Figure(
        figsize=(9, max(2.5, 1.2 + 0.22 * min(len(names), _LABELS))), dpi=120, layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    each = -(-len(names) // _LABELS)
    axes.set_yticks(range(0, len(names), each), names[::each], fontsize=7)
    across = -(-len(steps) // 10)
    axes.set_xticks(range(0, len(steps), across), [str(step) for step in steps[::across]])
    axes.set_xlabel("optimizer step")
    label = quantity.replace("_", " ")
    figure.colorbar(image, ax=axes, label=label if quantity in _LINEAR else f"log10 of {label}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
