"""Reduction of learning rates on a plateau of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

from torch.optim import Optimizer
from typing_extensions import override

from lightning_tricks._core.checks import check_choice
from lightning_tricks._core.schedule import Schedule
from lightning_tricks._core.schedulers import PlateauScheduler
from lightning_tricks.errors import ArgumentError

__all__ = ["ReduceOnPlateau"]


@dataclass(frozen=True, repr=False, kw_only=True)
class ReduceOnPlateau(Schedule):
    """Reduction by a factor whenever a metric has stopped improving, seen at each validation; for learning rates alone.

    Args:
        monitor: Name under which the module logs the metric.
        mode: Whether a smaller (``"min"``) or a greater (``"max"``) metric is better.
        factor: What the rates are multiplied by each time, in (0, 1).
        patience: Number of validations without improvement that are tolerated.
        threshold: How much better than the best a metric must be to count as improved, at least 0.
        threshold_mode: Whether the threshold is a share of the best metric (``"rel"``) or a difference from it (``"abs"``).
        cooldown: Number of validations after a reduction during which none counts as bad.
        final: The share of the base rates below which no reduction leads, in [0, 1].
        warmup: Duration W over which the rates grow as ``(t + 1)/(W + 1)``; 0 = none.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is torch's ``ReduceLROnPlateau``, asked after every validation of a fit: as often as there is a new metric, and before
        checkpoints are written, so that resuming is exact. Lightning by itself asks once per training epoch, and not at all after
        resuming from a checkpoint of that epoch's validation. Unlike torch's it reduces even rates below 1e-8. Without a Trainer,
        `value` knows the warm-up alone.

    Example:
        >>> ReduceOnPlateau("val_acc", mode="max", patience=2)
        ReduceOnPlateau(monitor='val_acc', mode='max', patience=2)
    """

    monitor: str = field(kw_only=False)
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    final: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.monitor, str) or not self.monitor:
            msg = f"`monitor` must be the name of a logged metric, such as 'val_loss', got {self.monitor!r}."
            raise ArgumentError(msg)
        check_choice("mode", self.mode, ("min", "max"))
        check_choice("threshold_mode", self.threshold_mode, ("rel", "abs"))
        self._check("factor", "(0, 1)")
        self._check("threshold", "[0, ∞)")
        self._check("final", "[0, 1]")
        for name in ("patience", "cooldown"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                msg = f"`{name}` must be a number of validations, got {value!r}."
                raise ArgumentError(msg)
            self._set(name, int(value))

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self.final, 1.0

    @property
    @override
    def metric(self) -> str:
        return self.monitor

    @override
    def after_warmup(self, step: int, spans: Mapping[str, float]) -> float:
        return 1.0

    @override
    def _scheduler(self, optimizer: Optimizer) -> PlateauScheduler:
        return PlateauScheduler(
            optimizer,
            least=self.final,
            mode=self.mode,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
        )
