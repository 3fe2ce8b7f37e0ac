"""What was measured of each layer at some steps, as a table that goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

__all__ = ["MEASURED", "QUANTITIES", "FlowHistory", "Quantity", "Row"]

Quantity = Literal["grad_norm", "weight_norm", "update_norm", "update_ratio", "mean", "std", "dead", "saturated"]
QUANTITIES: Final = get_args(Quantity)
MEASURED: Final = tuple(quantity for quantity in QUANTITIES if quantity != "update_ratio")
Row = Mapping[str, float]
_MOST: Final = 1000


class FlowHistory:
    """Rows of quantities by layer, for each step that was recorded.

    Of more than a thousand records, every other one is dropped, so that the whole run stays in sight at a bounded size.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.steps: list[int] = []
        self._values: list[Tensor] = []  # for each step: layers by quantities

    def add(self, step: int, rows: Mapping[str, Row]) -> None:
        """Add what was measured at a step; what another optimizer has measured at the same step is completed."""
        self.layers += [layer for layer in rows if layer not in self.layers]
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
            self._values.append(torch.full((0, len(MEASURED)), math.nan))
        values = self._values[-1] = _grown(self._values[-1], len(self.layers))
        for layer, row in rows.items():
            measured = torch.tensor([row.get(quantity, math.nan) for quantity in MEASURED])
            line = values[self.layers.index(layer)]
            line.copy_(torch.where(measured.isnan() & ~line.isnan(), line, measured))
        if len(self.steps) > _MOST:
            self.steps, self._values = self.steps[::2], self._values[::2]

    def table(self, quantity: Quantity) -> Tensor:
        """Return a quantity of all layers, in rows, at all steps, in columns; NaN where it was not measured."""
        if quantity == "update_ratio":
            return self.table("update_norm") / self.table("weight_norm")
        values = self._stacked()[..., MEASURED.index(quantity)]
        return values.T.clone()

    def _stacked(self) -> Tensor:
        if not self._values:
            return torch.zeros(0, len(self.layers), len(MEASURED))
        return torch.stack([_grown(values, len(self.layers)) for values in self._values])

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers and one tensor."""
        return {"layers": list(self.layers), "steps": list(self.steps), "values": self._stacked()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self.layers, self.steps = list(state["layers"]), list(state["steps"])
        self._values = list(state["values"].cpu().unbind())


def _grown(values: Tensor, layers: int) -> Tensor:
    """Return a table with more rows, which are NaN; clones it, so that views of a loaded tensor are let go."""
    grown = torch.full((layers, values.shape[1]), math.nan)
    grown[: len(values)] = values
    return grown
