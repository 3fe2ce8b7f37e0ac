"""Torch's schedulers as schedules need them: counting optimizer steps, at any step, from any base rates."""

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
    """Multiplies base rates by a function of the optimizer steps taken so far; `step` is called after each of them."""

    base_lrs: list[Any]

    @property
    @abstractmethod
    def position(self) -> int:
        """The optimizer steps taken so far."""

    @abstractmethod
    def go_to(self, step: int) -> None:
        """Set the rates with which the optimizer step after `step` others is taken."""

    def adopt_rates(self) -> None:
        """Take rates that somebody else has set for the base rates."""
        self.base_lrs = self._rates()
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.go_to(self.position)

    def _rates(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _write_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * factor
        self._last_lr = self._rates()


class CurveScheduler(StepScheduler, LambdaLR):
    """Multiplies the rates the optimizer was built with."""

    @property
    @override
    def position(self) -> int:
        return self.last_epoch

    @override
    def go_to(self, step: int) -> None:
        self.last_epoch = step
        self._write_rates(self.lr_lambdas[0](step))


class PlateauScheduler(StepScheduler, ReduceLROnPlateau):
    """Multiplies rates that are reduced by a metric: `step` is called with one after each validation."""

    def __init__(self, optimizer: Optimizer, curve: Callable[[int], float], *, least: float, **options: Any) -> None:
        self._curve, self._position = curve, 0
        super().__init__(optimizer, min_lr=[group["lr"] * least for group in optimizer.param_groups], eps=0, **options)
        self.base_lrs = self._rates()
        self.go_to(0)

    @property
    @override
    def position(self) -> int:
        return self._position

    @override
    def go_to(self, step: int) -> None:
        self._position = step
        self._write_rates(self._curve(step))

    @override
    def step(self, metrics: Any = None, epoch: int | None = None) -> None:  # type: ignore[override]  # as in torch
        if metrics is None:
            self.go_to(self.position + 1)
        else:
            self._write_rates(1.0)
            super().step(metrics)
            self.base_lrs = self._rates()
            self.go_to(self.position)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_curve"}
