"""Epochs that follow from a seed alone, and fits that are cut short and go on with the epoch they were in.

Lightning keeps no random state in checkpoints, and restarts in the middle of what it was doing. Where each epoch begins by seeding, and
a fit goes on at the beginning of one, a run that was killed ends where one that was not does, to the bit.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.draws import fold
from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, override, seed_process
from lightning_tricks._core.loaders import seed_generators
from lightning_tricks._core.surgery import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["SeededEpochs", "seed_epoch"]


def seed_epoch(seed: int, epoch: int, rank: int, loaders: Iterable[Any]) -> None:
    """Seed what is drawn in an epoch, within a `seeded` block: order and augmentation of the data as well as dropout."""
    key, everyone = fold(seed, epoch, rank), os.environ.get("PL_GLOBAL_SEED", "")
    seed_process(key)
    os.environ["PL_GLOBAL_SEED"] = everyone  # which distributed samplers must have in common
    seed_generators(loaders, key)


class SeededEpochs(Callback):
    """Seeds each epoch of a fit, and saves a checkpoint before each but the first; for one fit, and the first of its callbacks.

    Args:
        seed: From which the epochs' seeds follow.
        path: Where the checkpoint is saved. A fit that is given it as `ckpt_path` goes on with the epoch that was to begin.
    """

    def __init__(self, seed: int, path: Path) -> None:
        self._seed, self._path = seed, path
        self._patches = Patches()
        self._saving = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loop = trainer.fit_loop
        self._patches.wrap(loop, "reset", lambda reset: partial(_reset, loop, reset))
        self._patches.wrap(loop.epoch_loop, "on_run_start", lambda start: partial(self._start, trainer, start))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self._saving = True
            unfinished = self._path.with_suffix(".unfinished")
            trainer.save_checkpoint(unfinished)
            if trainer.is_global_zero:
                unfinished.replace(self._path)
            self._saving = False
        self._seed_epoch(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._saving:  # the epoch that has been made ready is still to come
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counts["ready"] = counts["completed"]

    def _start(self, trainer: Trainer, start: Callable[[Any], None], fetcher: Any) -> None:
        """Begin an epoch's pass over the data, with the same random numbers where Lightning has begun the first one already."""
        self._seed_epoch(trainer)
        before = fetcher.combined_loader._iterator
        start(fetcher)
        if fetcher.combined_loader._iterator is before:
            iter(fetcher)

    def _seed_epoch(self, trainer: Trainer) -> None:
        loader: Any = trainer.fit_loop._combined_loader
        seed_epoch(self._seed, trainer.current_epoch, trainer.global_rank, loader.flattened)


def _reset(loop: Any, reset: Callable[[], None]) -> None:
    loop.restarting = False  # since it begins an epoch, and finishes none
    reset()
