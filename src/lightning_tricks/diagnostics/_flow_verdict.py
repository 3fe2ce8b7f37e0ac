"""From what was measured at one step to words: gradients that vanish or explode, dead units, saturation, values that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_tricks.diagnostics._flow_history import Row

__all__ = ["FlowJudge", "Limits"]

_EARLIER = 3  # records without which nothing can be said of an explosion


@dataclass(frozen=True)
class Limits:
    """From where on something is worth a warning; `GradientFlow` explains each."""

    vanishing: float
    exploding: float
    dead: float
    saturated: float


@dataclass
class FlowJudge:
    """Puts records into words, each thing once: what has been said is not said again.

    Attributes:
        limits: From where on something is worth a warning.
        said: What has been said, and of which layer.
        totals: Norms of the whole gradient at earlier records.
        small: Layers whose gradient was small at the latest record.
    """

    limits: Limits
    said: set[tuple[str, str]] = field(default_factory=set)
    totals: list[float] = field(default_factory=list)
    small: set[str] = field(default_factory=set)

    def judge(self, rows: Mapping[str, Row], sizes: Mapping[str, int], order: Sequence[str]) -> list[str]:
        """Return what is to be said about one record.

        Args:
            rows: What was measured, by layer, in the order of definition.
            sizes: Numbers of weights of layers.
            order: Layers in the order of their calls, as far as that was seen.
        """
        order = [*order, *(layer for layer in rows if layer not in order)]
        broken = self._broken(rows, order)
        if broken:
            return broken
        return [*self._gradients(rows, sizes), *self._units(rows)]

    def _broken(self, rows: Mapping[str, Row], order: Sequence[str]) -> list[str]:
        def first(quantity: str, layers: Sequence[str]) -> str | None:
            """Return the first of the layers that has the quantity, and not as a number; a mean of nothing is no failure."""
            return next((layer for layer in layers if quantity in rows.get(layer, ()) and not math.isfinite(rows[layer][quantity])), None)

        weight = first("weight_norm", order)
        forward, backward = first("mean", order), first("grad_norm", order[::-1])
        if weight is not None:
            told = [f"weights of {weight!r} were not finite before this step; record with `every=1` from an earlier checkpoint"]
        else:
            told = [] if forward is None else [f"the first layer in the forward pass whose output is not finite is {forward!r}"]
            told += [] if backward is None else [f"the first layer in the backward pass whose gradient is not finite is {backward!r}"]
        return self._once("broken", [(text, text) for text in told])

    def _gradients(self, rows: Mapping[str, Row], sizes: Mapping[str, int]) -> list[str]:
        strengths = {layer: row["grad_norm"] / math.sqrt(sizes[layer]) for layer, row in rows.items() if "grad_norm" in row}
        total = math.hypot(*(row["grad_norm"] for row in rows.values() if "grad_norm" in row))
        largest = max(strengths, key=lambda layer: strengths[layer], default="")
        small = {layer for layer, strength in strengths.items() if strength < self.limits.vanishing * strengths[largest]}
        lasting, self.small = [layer for layer in strengths if layer in small & self.small], small
        said = self._once("vanishing", [(layer, repr(layer)) for layer in lasting])
        told = (
            [f"gradients vanish in {_listed(said)}: root mean square below {self.limits.vanishing:g} of that in {largest!r}"]
            if said
            else []
        )
        usual = median(self.totals) if len(self.totals) >= _EARLIER else math.inf
        if total > self.limits.exploding * usual:
            text = f"gradients explode: their norm {total:.3g} is more than {self.limits.exploding:g} times the median {usual:.3g} so far"
            told += self._once("exploding", [("", text)])
        self.totals.append(total)
        return told

    def _units(self, rows: Mapping[str, Row]) -> list[str]:
        told = []
        for quantity, limit, words in (
            ("dead", self.limits.dead, "units are dead (zero for the whole batch)"),
            ("saturated", self.limits.saturated, "values are saturated"),
        ):
            layers = [layer for layer, row in rows.items() if row.get(quantity, math.nan) > limit]
            said = self._once(quantity, [(layer, f"{layer!r} ({rows[layer][quantity]:.0%})") for layer in layers])
            told += [f"more than {limit:.0%} of {words} in {_listed(said)}"] if said else []
        return told

    def _once(self, kind: str, things: Sequence[tuple[str, str]]) -> list[str]:
        """Return the texts of those things that have not been said yet, and remember them."""
        new = [(thing, text) for thing, text in things if (kind, thing) not in self.said]
        self.said |= {(kind, thing) for thing, _ in new}
        return [text for _, text in new]


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more layers" if len(texts) > 4 else "")
