"""The abstract base of callbacks that lend the model other weights for the length of an evaluation."""

from __future__ import annotations

from abc import abstractmethod

from lightning_tricks._core.lightning import LightningModule, Trainer, callbacks_of, override
from lightning_tricks._core.strategies import abandon_forward
from lightning_tricks._core.trick import Trick

__all__ = ["SwappingTrick", "settle_weights"]


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

    @abstractmethod
    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Let the module hold, at the end of a fit, what it is to be evaluated with; a second call does nothing."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)  # Lightning leaves `on_train_end` out where nothing was left to train

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
        abandon_forward(pl_module)
        self._leave()


def settle_weights(trainer: Trainer, module: LightningModule) -> None:
    """Let the module hold, at the end of a fit, what it is to be evaluated with, wherever in the list the callback is that knows."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, SwappingTrick):
            callback._settle(trainer, module)
