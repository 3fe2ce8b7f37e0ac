"""The abstract base of callbacks whose changes to a model are recorded in every file that holds its weights."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.lightning import LightningModule, Trainer, callbacks_of, override
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.trick import Trick

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RecordingTrick"]


class RecordingTrick(Trick):
    """Records as a file is written, since Lightning does not ask callbacks about files of weights alone."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._recording = Patches()  # until the next setup, since files are written after a fit, too

    @abstractmethod
    def _record(self, checkpoint: dict[str, Any]) -> None:
        """Record what was done to the model, unless the checkpoint has it already."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._recording.undo()
        self._recording.wrap(trainer.strategy, "save_checkpoint", lambda save: partial(_save, trainer, save))


def _save(trainer: Trainer, save: Callable[..., None], checkpoint: dict[str, Any], *arguments: Any, **options: Any) -> None:
    """Let all of a Trainer's tricks record, in the order in which they have changed the model."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, RecordingTrick):
            callback._record(checkpoint)
    save(checkpoint, *arguments, **options)
