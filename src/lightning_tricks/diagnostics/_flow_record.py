"""From what was measured on the device, in one transfer, to one row of quantities for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

from lightning_tricks._core.strategies import plain_name
from lightning_tricks.diagnostics._flow_history import QUANTITIES

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_tricks.diagnostics._flow_history import Row
    from lightning_tricks.diagnostics._step_norms import StepNorms

__all__ = ["layer_of", "layers_of", "rows_of", "shown", "sizes_of", "summary_of"]

_NORMS = ("grad_norm", "weight_norm", "update_norm")
_ACTIVATION = ("mean", "std", "dead", "saturated")


def shown(name: str) -> str:
    """Return a module's name as the user knows it, without the wrappers of strategies and of torch.compile."""
    return plain_name(name, compiled=False)


def layer_of(name: str) -> str:
    """Return the layer that owns a parameter, parametrized or not; one that the model itself owns stands for itself."""
    return shown(name.rpartition(".")[0].partition(".parametrizations.")[0] or name)


def sizes_of(measured: Iterable[StepNorms]) -> dict[str, int]:
    """Return how many weights of each layer were measured."""
    sizes: dict[str, int] = {}
    for norms in measured:
        for name, tensor in norms.tensors.items():
            sizes[layer_of(name)] = sizes.get(layer_of(name), 0) + tensor.shape.numel()
    return sizes


def rows_of(
    measured: Sequence[tuple[StepNorms, Tensor]], activations: Mapping[str, Tensor], order: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Bring to the host in one piece what was measured, and join it by layer.

    Args:
        measured: For each optimizer, what it has measured, and the norms.
        activations: Statistics of outputs by module.
        order: The places of layers; others come first.
    """
    pieces = [*(values.flatten() for _, values in measured), *activations.values()]
    numbers = iter(torch.cat([piece.to(pieces[0].device) for piece in pieces]).tolist())
    rows: dict[str, dict[str, float]] = {}
    for norms, _ in measured:
        for quantity in _NORMS:
            for name in norms.tensors:
                row = rows.setdefault(layer_of(name), {})
                row[quantity] = math.hypot(row.get(quantity, 0.0), next(numbers))
    for layer in activations:
        mean, std, dead, saturated = (next(numbers) for _ in _ACTIVATION)
        row = rows.setdefault(layer, {})
        row |= {"mean": mean, "std": std}
        row |= {} if math.isnan(dead) else {"dead": dead}
        row |= {} if math.isnan(saturated) else {"saturated": saturated}
    return dict(sorted(rows.items(), key=lambda item: order.get(item[0], -1)))


def layers_of(rows: Mapping[str, Row]) -> dict[str, float]:
    """Return every quantity of every layer, as it is logged."""
    return {f"{layer}/{quantity}": value for layer, row in rows.items() for quantity, value in _with_ratio(row).items()}


def summary_of(rows: Mapping[str, Row]) -> dict[str, float]:
    """Return the norm of the whole gradient, and the smallest, median and largest of layers, as it is logged."""
    complete = [_with_ratio(row) for row in rows.values()]
    values = {quantity: [row[quantity] for row in complete if quantity in row] for quantity in QUANTITIES}
    summary = {"grad_norm": math.hypot(*values["grad_norm"])}
    for quantity in ("grad_norm", "update_ratio"):
        each = values[quantity]
        summary |= {f"{quantity}_min": min(each), f"{quantity}_median": median(each), f"{quantity}_max": max(each)}
    return summary | {f"{quantity}_max": max(values[quantity]) for quantity in ("dead", "saturated") if values[quantity]}


def _with_ratio(row: Row) -> dict[str, float]:
    """Add the ratio of update and weight; a layer of zeros that moves has an infinite one."""
    if "update_norm" not in row:
        return dict(row)
    update, weight = row["update_norm"], row["weight_norm"]
    return {**row, "update_ratio": update / weight if weight else math.inf if update else 0.0}
