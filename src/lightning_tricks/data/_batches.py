"""Batches of training: tensors in them, and the abstract base of callbacks that change batches on the device."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_tricks._core.draws import fold
from lightning_tricks._core.lightning import LightningModule, Trainer, override
from lightning_tricks._core.loaders import place_in_pass
from lightning_tricks._core.seeding import SeededTrick
from lightning_tricks._core.strategies import data_rank
from lightning_tricks.errors import TrickError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BatchTrick", "after_transfer", "describe", "find", "replaced", "with_item"]


def find(batch: Any, item: int | str | None) -> Any:
    """Return what sits at an index or key of a batch, or its first tensor; None if there is nothing."""
    if item is None:
        return next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    try:
        return None if isinstance(batch, Tensor) else batch[item]
    except (LookupError, TypeError):
        return None


def describe(batch: Any, item: int | str | None) -> str:
    """Say for errors what sits at a place of a batch, and what batch that is."""
    found = find(batch, item)
    keys = f" with keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
    count = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    what = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    return f"`item={item!r}` is {what} in a {type(batch).__name__}{count}{keys}"


def with_item(values: Any, place: Any, value: Any) -> Any:
    """Return a tuple, list or mapping with another value at a place."""
    if isinstance(values, tuple):
        items = [*values]
        items[place] = value
        return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)
    changed = copy(values)
    changed[place] = value
    return changed


def replaced(batch: Any, item: int | str | None, value: Any) -> Any:
    """Return a batch with another value where `find` finds one; the batch itself, which may belong to a data set, stays as it is."""
    if item is not None:
        return with_item(batch, item, value)
    leaves, structure = tree_flatten(batch)
    leaves[next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))] = value
    return tree_unflatten(leaves, structure)


class BatchTrick(SeededTrick):
    """Changes each batch of training once it is on the device and all hooks of the module and data module have seen it.

    Evaluations, the sanity check included, see plain batches; additional passes over the training data, such as those that measure
    statistics, see what training sees. What is drawn follows from a key of seed, rank, epoch, step and batch. Hence a resumed run draws
    what it would have drawn, and no generator's state is touched.
    """

    turn: ClassVar[int]  # among several: lower ones come first, whatever the order of the callbacks

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._reached = False
        self._detach: Callable[[], None] | None = None

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether there is nothing to change."""

    @abstractmethod
    def change(self, trainer: Trainer, batch: Any, key: int) -> Any:
        """Return the batch that training shall see instead; the batch itself, which may belong to a data set, stays as it is."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._undo()
            self._reached = False
            if not self.is_neutral:
                self._detach = after_transfer(trainer, partial(self._change, trainer), turn=self.turn)

    def _change(self, trainer: Trainer, batch: Any) -> Any:
        self._reached = True
        with torch.no_grad():
            return self.change(trainer, batch, self._key(trainer))

    def _key(self, trainer: Trainer) -> int:
        """Return what the draws for the batch follow from that the Trainer is about to train on."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        moment = data_rank(trainer), trainer.current_epoch, trainer.global_step, ready, place_in_pass()
        return fold(self._seed, *moment, zlib.crc32(self.state_key.encode()))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not (self._reached or self.is_neutral):
            msg = (
                f"{self!r} changes batches when the Trainer has moved them to the device, and `training_step` of "
                f"{type(pl_module).__name__} takes `dataloader_iter` and moves them itself. Let it take `batch`."
            )
            raise TrickError(msg)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def _undo(self) -> None:
        if self._detach is not None:
            self._detach()
        self._detach = None


class _Transfer:
    """Stands in for a strategy's `batch_to_device`: changes batches of training afterwards, those of lower turns first."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.own = trainer.strategy.batch_to_device
        self.changes: list[tuple[int, Callable[[Any], Any]]] = []

    def __call__(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        batch = self.own(batch, *arguments, **options)
        if self.trainer.training and batch is not None:
            for _, change in sorted(self.changes, key=lambda entry: entry[0]):
                batch = change(batch)
        return batch


def after_transfer(trainer: Trainer, change: Callable[[Any], Any], *, turn: int) -> Callable[[], None]:
    """Change batches of training once they are on the device, if not done already; return what ends that."""
    strategy = trainer.strategy
    transfer = vars(strategy).get("batch_to_device")
    if not isinstance(transfer, _Transfer):
        transfer = _Transfer(trainer)
        vars(strategy)["batch_to_device"] = transfer
    entry = turn, change
    if entry not in transfer.changes:
        transfer.changes.append(entry)

    def undo() -> None:
        if entry in transfer.changes:
            transfer.changes.remove(entry)
        if not transfer.changes and vars(strategy).get("batch_to_device") is transfer:
            del vars(strategy)["batch_to_device"]

    return undo
