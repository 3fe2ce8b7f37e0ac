"""The seed of a run, and the abstract base of callbacks whose draws follow from it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rng_states, seed_process, set_rng_states
from lightning_tricks._core.trick import Trick

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SeededTrick", "seed_of_run", "seeded", "unseeded"]

_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def seed_of_run() -> int:
    """Return the seed that was given to Lightning's ``seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@contextmanager
def unseeded() -> Iterator[None]:
    """Let random numbers, and what `seed_everything` writes down, be after a block what they were before, whatever ends it."""
    states, before = rng_states(), {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        set_rng_states(states)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let all random numbers in a block follow from a seed, and go on afterwards as if it had drawn none."""
    with unseeded():
        seed_process(seed)
        yield


class SeededTrick(Trick):
    """Takes the seed of the run when a fit begins, and keeps it in checkpoints, so that a resumed fit draws what it would have drawn."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._seed = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seed = seed_of_run()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"seed": self._seed})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._seed = int(entry["seed"])
