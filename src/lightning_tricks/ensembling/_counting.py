"""The abstract base of ensembles whose members are taken at certain optimizer steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.lightning import LightningModule, Trainer, callbacks_of, is_rate_finder, override
from lightning_tricks.ensembling._cyclic_rates import CyclicRates
from lightning_tricks.ensembling._ensemble_trick import EnsembleTrick

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CountingEnsemble"]


class CountingEnsemble(EnsembleTrick):
    """Counts the steps that the first optimizer has really taken since the beginning of training, and may set rates by them."""

    _rates: CyclicRates

    @abstractmethod
    def _resolve(self, trainer: Trainer) -> None:
        """Convert durations to steps, once the Trainer knows its data."""

    def _factor(self) -> Callable[[int], float | None] | None:
        """Return what base rates are multiplied by for the step after that many others, None where they are left alone."""
        return None

    def _highest(self) -> float | None:
        """Return what the highest base rate becomes; None if it stays."""
        return None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rates.steps == 0:  # of a run that is resumed from a checkpoint made without this callback
            self._rates.steps = trainer.global_step // max(1, len(trainer.optimizers))
        self._resolve(trainer)
        self._attach(trainer)

    def _skipped(self, trainer: Trainer, planned: float) -> int:
        """Return how many of the planned steps were none when all are over, as those that a gradient scaler skips; until then 0."""
        over = len(trainer.optimizers) == 1 and trainer.global_step >= planned  # Lightning counts skipped ones, too
        return int(planned) - self._rates.steps if over else 0

    def _attach(self, trainer: Trainer) -> None:
        found = any(is_rate_finder(callback) for callback in callbacks_of(trainer))
        self._rates.attach(trainer.optimizers, self._factor(), highest=self._highest(), found=found)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._rates.follows(trainer.optimizers):
            self._attach(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._rates.detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._rates.detach()

    @override
    def _pack(self) -> dict[str, Any]:
        return self._rates.pack()

    @override
    def _unpack(self, entry: Mapping[str, Any]) -> None:
        self._rates = CyclicRates()
        if entry:
            self._rates.unpack(entry)
