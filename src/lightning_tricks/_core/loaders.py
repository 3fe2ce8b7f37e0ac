"""Additional passes over data that leave loaders, samplers and the random state as they were."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lightning_tricks._core.lightning import LightningModule, Trainer, defines, isolate_rng
from lightning_tricks._core.strategies import through_wrapper

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["evaluate_batch", "move_batch", "seed_generators", "training_pass", "untouched", "untouched_generators"]


@contextmanager
def untouched(loaders: Iterable[Any]) -> Iterator[None]:
    """Let loaders be iterated anew, and give everything back that iterating changes.

    That is the random state of the process, and the attributes and generators of the loaders, their samplers and their data sets.
    """
    owners = {id(part): part for loader in loaders for part in _parts(loader)}
    kept = [(owner, dict(vars(owner))) for owner in owners.values()]
    for owner, attributes in kept:
        if "_iterator" in attributes:
            owner._iterator = None  # persistent workers go on with the batches that training has asked for
    try:
        with isolate_rng(), untouched_generators(owners.values()):
            yield
    finally:
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)


def _parts(loader: Any) -> list[Any]:
    """Return a loader, its samplers and its data set, as far as there are any."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    return [part for part in (loader, *samplers, getattr(loader, "dataset", None)) if hasattr(part, "__dict__")]


def seed_generators(loaders: Iterable[Any], seed: int) -> None:
    """Seed the generators that loaders, their samplers and their data sets hold."""
    for part in (part for loader in loaders for part in _parts(loader)):
        for value in vars(part).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)


@contextmanager
def untouched_generators(owners: Iterable[Any]) -> Iterator[None]:
    """Let the generators that objects hold draw the same random numbers again afterwards."""
    attributes = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    generators = [value for value in attributes if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def training_pass(trainer: Trainer, batches: int | None) -> Iterator[Iterator[Any]]:
    """Give the batches of one epoch of training, or the first few, as if the Trainer were training.

    None are given if the Trainer has loaded no training data.
    """
    loader: Any = trainer.fit_loop._combined_loader
    if loader is None:
        yield iter(())
        return
    stage, limits = trainer.state.stage, [limit for limit in (batches, trainer.num_training_batches) if limit is not None]
    limit = min(limits)
    try:
        trainer.training = True  # hooks that move batches may ask
        with untouched(loader.flattened):
            yield (batch for batch, *_ in islice(iter(copy(loader)), None if limit == float("inf") else int(limit)))
    finally:
        trainer.state.stage = stage


def move_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Bring a batch to the device through the module's hooks, as the training loop does."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def evaluate_batch(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
    """Let a module compute its output for a batch as it does in evaluation: by `predict_step` if it defines that, or by `forward`."""
    batch = move_batch(trainer, module, batch)
    with trainer.precision_plugin.forward_context():
        if defines(module, "predict_step"):
            through_wrapper(trainer, "predict_step")(batch, index)
        else:
            through_wrapper(trainer, "forward")(batch[0] if isinstance(batch, tuple | list) else batch)
