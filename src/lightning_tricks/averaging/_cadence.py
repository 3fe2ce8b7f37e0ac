"""When an average begins, and when it is updated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_tricks._core.clock import Duration
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from lightning_tricks._core.lightning import Trainer
    from lightning_tricks.averaging._tracks import Track

__all__ = ["Cadence"]


class Cadence:
    """A beginning and a repetition, each in steps of a track's own optimizers or in whole epochs.

    Epochs are counted as they pass rather than converted to steps, so that they need not have a known length.
    """

    def __init__(self, start: int | str, every: int | str, stop: int | str | None = None) -> None:
        self._start, self._every = Duration.parse("start", start), Duration.parse("every", every, least=1)
        self._stop = None if stop is None else Duration.parse("stop", stop, least=1)
        if self._stop is not None and self._stop.unit == self._start.unit and self._stop.amount <= self._start.amount:
            msg = f"`stop` must come after `start`, got start={start!r} and stop={stop!r}."
            raise ArgumentError(msg)
        self._stop_step: float = math.inf
        self._start_step: int | None = None  # None where the duration is in epochs
        self._every_steps: int | None = None
        self.ended_epoch = -1  # the latest epoch whose end was counted

    def resolve(self, trainer: Trainer) -> None:
        """Convert durations to steps, once the Trainer knows its data."""
        self._start_step = None if self._start.unit == "epochs" else self._start.steps("start", trainer)
        self._every_steps = None if self._every.unit == "epochs" else max(1, self._every.steps("every", trainer))
        if self._stop is not None and self._stop.unit != "epochs":
            self._stop_step = self._stop.steps("stop", trainer)

    def begins(self, track: Track, epoch: int) -> bool:
        """Tell whether a track that has not begun is to begin now."""
        return track.begun is None and (epoch >= self._start.amount if self._start_step is None else track.steps >= self._start_step)

    def due_after_step(self, track: Track, epoch: int) -> bool:
        """Tell whether a track is to be updated after the step that it has just counted."""
        if self._every_steps is None or track.begun is None or self._over(track, epoch):
            return False
        return (track.steps - track.begun) % self._every_steps == 0

    def ends_epoch(self, epoch: int) -> bool:
        """Count the end of an epoch, once however often it is told."""
        ends, self.ended_epoch = epoch != self.ended_epoch, epoch
        return ends

    def due_after_epoch(self, track: Track, epoch: int) -> bool:
        """Tell whether a track is to be updated at the end of an epoch."""
        if self._every_steps is not None or track.begun is None or track.steps == track.latest or self._over(track, epoch):
            return False
        return (epoch + 1 - track.epoch) % int(self._every.amount) == 0

    def _over(self, track: Track, epoch: int) -> bool:
        in_epochs = self._stop is not None and self._stop.unit == "epochs" and epoch >= self._stop.amount
        return in_epochs or track.steps > self._stop_step
