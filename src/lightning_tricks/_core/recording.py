"""The abstract base of callbacks whose changes to a model are recorded in every file that holds its weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.lightning import LightningModule, Trainer, callbacks_of, override
from lightning_tricks._core.trick import Trick

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RecordingTrick"]


class RecordingTrick(Trick):
    """Records as a file is written, since Lightning does not ask callbacks about files of weights alone."""

    @abstractmethod
    def _record(self, checkpoint: dict[str, Any]) -> None:
        """Record what was done to the model, unless the checkpoint has it already."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        strategy: Any = trainer.strategy
        if not isinstance(strategy.save_checkpoint, _Save):  # which stays, since files are written after a fit, too
            strategy.save_checkpoint = _Save(trainer, strategy.save_checkpoint)


class _Save:
    """Lets all of a Trainer's tricks record, in the order in which they have changed the model, before a file is written."""

    def __init__(self, trainer: Trainer, save: Callable[..., None]) -> None:
        self.trainer, self.save = trainer, save

    def __call__(self, checkpoint: dict[str, Any], *arguments: Any, **options: Any) -> None:
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, RecordingTrick):
                callback._record(checkpoint)
        self.save(checkpoint, *arguments, **options)
