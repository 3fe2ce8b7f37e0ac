"""The abstract base of callbacks that lend the model other weights for the length of an evaluation."""

from __future__ import annotations

from abc import abstractmethod

from lightning_tricks._core.lightning import LightningModule, Trainer, override
from lightning_tricks._core.trick import Trick

__all__ = ["SwappingTrick"]


class SwappingTrick(Trick):
    """Calls `_enter` at the start of every validation, test and predict, and `_leave` at its end, whichever way it ends.

    Starts and ends are the outermost hooks, so that the module's own epoch hooks see what its steps have seen.
    """

    @abstractmethod
    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Lend the weights, if there are any for this model."""

    @abstractmethod
    def _leave(self) -> None:
        """Take them back; do nothing if none are lent."""

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()
