"""What packed members log, kept for each, since a Trainer that is handed each member's every value spends more on them than on training."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_tricks._core.lightning import LightningModule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = ["PackedLogs"]

Stage = Literal["train", "validation"]

_OPTIONS = list(signature(LightningModule.log).parameters)[3:]


@dataclass
class _Series:
    """The values of one name in an epoch, for all members at once."""

    stage: Stage
    on_step: bool
    on_epoch: bool
    last: Tensor
    total: Tensor
    weight: float


class PackedLogs:
    """Stands in for members' `log`, and keeps the latest epoch of each name: the last values, and the means weighted by batch size."""

    def __init__(self) -> None:
        self.caught: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._series: dict[str, _Series] = {}

    def catch(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """Take what a member logs."""
        self.caught[name] = value, {**dict(zip(_OPTIONS, arguments, strict=False)), **options}

    def begin(self, stage: Stage) -> None:
        """Forget what was logged in the epoch before."""
        self._series = {name: series for name, series in self._series.items() if series.stage != stage}

    def add(self, stage: Stage, logged: Mapping[str, Tensor], options: Mapping[str, dict[str, Any]], size: int) -> Iterator[Any]:
        """Keep the members' values, and give for each name the arguments that log their mean.

        Args:
            stage: That of the step.
            logged: One value for each member, NaN where it logged none.
            options: With which they were logged.
            size: The members' batch size, where they do not tell.
        """
        for name, values in logged.items():
            given = {**options[name], "batch_size": options[name].get("batch_size") or size}
            on_step, on_epoch = given.get("on_step"), given.get("on_epoch")
            step = stage == "train" if on_step is None else on_step
            epoch = stage == "validation" if on_epoch is None else on_epoch
            if name not in self._series:
                self._series[name] = _Series(stage, step, epoch, values, torch.zeros_like(values), 0.0)
            series = self._series[name]
            series.last = values
            series.total, series.weight = series.total + given["batch_size"] * values, series.weight + given["batch_size"]
            yield name, values.nanmean(), given

    def of_epoch(self, stage: Stage) -> dict[str, Tensor]:
        """Return the members' values for an epoch that has ended, as ``member_<number>/<name>``."""
        found = {name: _value(series) for name, series in self._series.items() if series.stage == stage}
        return {f"member_{member}/{name}": value for name, values in found.items() for member, value in enumerate(values)}

    def metrics(self, member: int) -> dict[str, float]:
        """Return what a Trainer of this member alone would have in ``callback_metrics``."""
        found = {}
        for name, series in self._series.items():
            if series.on_step and series.on_epoch:
                found |= {f"{name}_step": series.last[member].item(), f"{name}_epoch": _value(series)[member].item()}
            found[name] = _value(series)[member].item()
        return found


def _value(series: _Series) -> Tensor:
    return series.total / series.weight if series.on_epoch else series.last
