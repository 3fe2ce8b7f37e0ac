"""Torch's schedulers as schedules need them: counting optimizer steps, from any of them on, over a function known when training starts.

Lengths of a fit are not known yet where optimizers are built: asking for them there would make Lightning load the training data
early, and a loader's saved state would no longer be restored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

__all__ = ["CurveScheduler", "PlateauScheduler", "StepScheduler"]


class StepScheduler(LRScheduler, ABC):
    """Multiplies base rates by a function of the optimizer steps taken so far; `step` is called after each of them.

    Until `begin`, the rates are the base rates.
    """

    base_lrs: list[Any]

    @property
    @abstractmethod
    def position(self) -> int:
        """The optimizer steps taken so far."""

    @abstractmethod
    def begin(self, curve: Callable[[int], float], step: int) -> None:
        """Follow a function, and set the rates with which the optimizer step after `step` others is taken."""

    def adopt_rates(self) -> None:
        """Take rates that somebody else has set for the base rates."""
        self.base_lrs = self._rates()
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def _rates(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _write_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * factor
        self._last_lr = self._rates()


class CurveScheduler(StepScheduler, LambdaLR):
    """Multiplies the rates the optimizer was built with."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, _one)

    @property
    @override
    def position(self) -> int:
        return self.last_epoch

    @override
    def begin(self, curve: Callable[[int], float], step: int) -> None:
        self.lr_lambdas, self.last_epoch = [curve] * len(self.base_lrs), step
        self._write_rates(curve(step))


class PlateauScheduler(StepScheduler, ReduceLROnPlateau):
    """Multiplies rates that are reduced by a metric: `step` is called with one after each validation."""

    def __init__(self, optimizer: Optimizer, *, least: float, **options: Any) -> None:
        self._curve: Callable[[int], float] = _one
        self._position, self._least = 0, least
        super().__init__(optimizer, eps=0, **options)
        self.adopt_rates()

    @property
    @override
    def position(self) -> int:
        return self._position

    @override
    def begin(self, curve: Callable[[int], float], step: int) -> None:
        self._curve, self._position = curve, step
        self._write_rates(curve(step))

    @override
    def adopt_rates(self) -> None:
        super().adopt_rates()
        self.min_lrs = [rate * self._least for rate in self.base_lrs]

    @override
    def step(self, metrics: Any = None, epoch: int | None = None) -> None:  # type: ignore[override]  # as in torch
        if metrics is None:
            self._position += 1
        else:
            self._write_rates(1.0)
            super().step(metrics)
            self.base_lrs = self._rates()
        self._write_rates(self._curve(self._position))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_curve"}


def _one(_: int) -> float:
    """Leave the rates as they are."""
    return 1.0
