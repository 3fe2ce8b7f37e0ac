"""A few steps of training in each way, which tell whether members may be packed, and whether that is faster."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, callbacks_of, override
from lightning_tricks.ensembling._ensemble import _tolerance
from lightning_tricks.ensembling._packing import CannotPackError, PackedMembers, loss_in, run_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["time_steps"]


class _EndOfTrialError(Exception):
    """Ends a fit that has told enough."""


class _Trial(Callback):
    """Times steps, what Lightning does between them included, and compares what packed members compute with what each does alone."""

    def __init__(self, steps: int) -> None:
        self.times: list[float] = []
        self._steps = steps
        self._end: float | None = None
        self._alone: list[Any] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._alone = pl_module.alone if isinstance(pl_module, PackedMembers) else []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._alone and isinstance(pl_module, PackedMembers):
            with trainer.precision_plugin.train_step_context():
                _compare(pl_module, self._alone, batch)
            self._alone = []
        if self._steps == 0:
            raise _EndOfTrialError

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        parameter = next(pl_module.parameters())
        if parameter.device.type != "cpu":
            parameter.flatten()[0].item()  # waits for the device
        now = self._clock(parameter.device.type)
        if self._end is not None:
            self.times.append(now - self._end)
        self._end = now
        last = trainer.global_step == trainer.max_steps or (trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)
        if last or len(self.times) == self._steps:  # without the Trainer's word that it has reached its end
            raise _EndOfTrialError

    def _clock(self, device: str) -> float:
        # Where one thread computes, the time that other processes take from it is left out.
        return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _compare(packed: PackedMembers, alone: Sequence[Any], batch: Any) -> None:
    """Compare the members' losses with those that each computes alone, unless these are random."""
    together = packed.losses(batch, 0)[0].detach()
    for member, module in enumerate(alone):
        module.to(device=packed.device, dtype=packed.dtype)
        for part in module.modules():
            if isinstance(part, LightningModule):
                part.log = lambda *_, **__: None  # type: ignore[method-assign]
        own = tree_map(lambda leaf, member=member: leaf[member], batch)
        loss, again = (loss_in(run_step(module, "training_step", own, 0)).detach() for _ in range(2))
        if loss == again and (together[member] - loss).abs() > _tolerance(loss) * max(1.0, loss.abs().item()):
            msg = f"mapping over the members gives other results: a loss of {together[member].item()} for {loss.item()} in member {member}"
            raise CannotPackError(msg)


def time_steps(trainer: Any, fit: Callable[[], None], steps: int) -> float:
    """Begin a fit, and return the seconds that the fastest of its first steps took; infinity if it has too few to tell.

    Raises:
        CannotPackError: If it is of packed members, and they cannot take a step, or their losses are not those that they have alone.
    """
    trial = _Trial(steps)
    callbacks_of(trainer)[:] = [trial]
    trainer.loggers = []
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    with suppress(_EndOfTrialError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of, the fit itself will
        fit()
    return min(trial.times, default=float("inf"))
