"""The forest plot of an ablation: what each trick changes, alone and beside the others, with 95 % intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_tricks.search._results import Ablation, Row

__all__ = ["Effect", "draw_forest", "effects_of", "reach_of"]

_STYLES = {"alone": ("#0072B2", "o"), "beside the others": ("#D55E00", "D"), "together": ("#222222", "s")}


class Effect(NamedTuple):
    """What having a trick changes, whether it was added or taken out."""

    label: str
    kind: str
    mean: float
    low: float
    high: float
    clear: bool


def effects_of(ablation: Ablation) -> list[list[Effect]]:
    """Return the effects trick by trick, the best first, and at last that of all together; what failed has none."""
    better = -1 if ablation.mode == "max" else 1
    groups: dict[str | None, list[Effect]] = {}
    for row in ablation.rows:
        effect = _effect(row)
        if effect is not None:
            groups.setdefault(row.trick, []).append(effect)
    together = groups.pop(None, [])
    ordered = sorted(groups.values(), key=lambda group: better * group[0].mean)
    return [*ordered, *([together] if together else [])]


def _effect(row: Row) -> Effect | None:
    difference = row.difference
    if difference is None or math.isnan(difference.mean):
        return None
    label = row.trick or "all together"
    kind = "together" if row.trick is None else "beside the others" if row.removes else "alone"
    low, high = (difference.mean if math.isnan(end) else end for end in (difference.low, difference.high))
    clear = row.verdict in {"helps", "hurts"}
    return (
        Effect(label, kind, -difference.mean, -high, -low, clear) if row.removes else Effect(label, kind, difference.mean, low, high, clear)
    )


def draw_forest(ablation: Ablation, path: Path) -> None:
    """Draw the plot into a PNG.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    figures = require("matplotlib.figure", package="matplotlib", extra="search", who="A forest plot")
    groups = effects_of(ablation)
    figure = figures.Figure(figsize=(8.4, 1.9 + 0.46 * max(len(groups), 1)), layout="constrained")
    axes = figure.subplots()
    reach = reach_of(groups)
    lowest, highest = (pick((end for group in groups for effect in group for end in effect[2:5]), default=0.0) for pick in (min, max))
    for place, group in enumerate(groups):
        if place % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        for offset, effect in zip([0.0] if len(group) == 1 else [-0.17, 0.17], group, strict=True):
            color, marker = _STYLES[effect.kind]
            axes.plot([effect.low, effect.high], [place + offset] * 2, color=color, linewidth=2, solid_capstyle="butt")
            for end, arrow in ((-reach, "<"), (reach, ">")):
                if (effect.low < -reach and end < 0) or (effect.high > reach and end > 0):
                    axes.plot(end, place + offset, arrow, color=color, markersize=7, clip_on=False)
            fill = color if effect.clear else "white"
            axes.plot(effect.mean, place + offset, marker, color=color, markerfacecolor=fill, markersize=6.5, markeredgewidth=1.8)
    axes.axvline(0, color="#666666", linewidth=1, zorder=1)
    axes.set_yticks(range(len(groups)), [group[0].label for group in groups])
    axes.set_ylim(max(len(groups), 1) - 0.5, -0.5)
    axes.set_xlim(max(-reach, min(lowest, 0) - reach / 20), min(reach, max(highest, 0) + reach / 20))
    worse, better = ("worse →", "← better") if ablation.mode == "min" else ("← worse", "better →")
    left, right = (better, worse) if ablation.mode == "min" else (worse, better)
    axes.set_xlabel(f"{left}      change of {ablation.metric} by the trick      {right}")
    axes.set_title(
        f"What each trick changes, {len(ablation.seeds)} {'seed' if len(ablation.seeds) == 1 else 'seeds'}",
        loc="left",
        fontweight="bold",
        pad=28,
    )
    axes.grid(axis="x", color="#E2E2E2", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    note = "bars: paired 95 % intervals; filled: p < 0.05 after Holm's correction"
    axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=8.5, color="#555555", va="bottom")
    kinds = [kind for kind in ("alone", "beside the others") if any(effect.kind == kind for group in groups for effect in group)]
    for kind in kinds:
        axes.plot([], [], "-" + _STYLES[kind][1], color=_STYLES[kind][0], markerfacecolor="white", markeredgewidth=1.8, label=kind)
    if kinds:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, columnspacing=1.2)
    figure.savefig(path, dpi=160)


def reach_of(groups: list[list[Effect]]) -> float:
    """Return how far an axis goes to each side: all means are on it; intervals that go much farther are cut."""
    effects = [effect for group in groups for effect in group]
    means = max((abs(effect.mean) for effect in effects), default=0.0)
    ends = max((max(abs(effect.low), abs(effect.high)) for effect in effects), default=0.0)
    return 1.05 * min(ends, max(4 * means, ends / 4)) or 1.0
