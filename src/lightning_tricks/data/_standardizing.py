"""The abstract base of callbacks that measure a tensor of the training set once, and let the model standardize it."""

from __future__ import annotations

import time
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lightning_tricks._core.checkpoint import read_changes, write_change, write_entry
from lightning_tricks._core.checks import check_bool, check_choice, check_dim, check_in_interval, check_item
from lightning_tricks._core.lightning import (
    STEP_OUTPUT,
    LightningModule,
    Trainer,
    callbacks_of,
    defines,
    override,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tricks._core.loaders import move_batch, training_pass
from lightning_tricks._core.preparing import prepare
from lightning_tricks._core.recording import RecordingTrick
from lightning_tricks._core.surgery import Patches
from lightning_tricks.data._standardizer import Standardizer, attach, submodule
from lightning_tricks.data._statistics import Collector, Per, StandardizationStatistics, Whitening, tensor_in
from lightning_tricks.errors import ArgumentError, NothingMatchedError, TrickConflictError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["StandardizingTrick"]

_PATIENCE = 30.0  # seconds between reports of progress


class StandardizingTrick(RecordingTrick):
    """Measures before the first step of the first fit, and keeps what it has measured in the model and in checkpoints."""

    kind: ClassVar[type[Standardizer]]
    function: ClassVar[str]  # of `functional`, which does the same to a model
    what: ClassVar[str]  # is standardized
    whitening: Whitening | None = None
    center: bool
    scale: bool

    def __init__(
        self,
        *,
        per: Per,
        batches: int | Literal["all"],
        dim: int,
        eps: float,
        center: bool,
        scale: bool,
        item: int | str | None,
        module: str,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.per = check_choice("per", per, ("channel", "feature"))
        if batches != "all" and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
            msg = f"`batches` must be a positive number of batches, or 'all' for all, got {batches!r}."
            raise ArgumentError(msg)
        self.batches: int | Literal["all"] = batches
        self.dim = check_dim("dim", dim, "channels")
        self.eps = check_in_interval("eps", eps, "[0, ∞)")
        self.center, self.scale = check_bool("center", center), check_bool("scale", scale)
        self.item = check_item(item)
        if not isinstance(module, str):
            msg = f"`module` must be the name of a module, or '' for the model itself, got {module!r}."
            raise ArgumentError(msg)
        self.module = module
        self._patches = Patches()
        self._part: Standardizer | None = None
        self._checked = False  # that training goes through it

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments of the function, besides the statistics, that change the model as this trick does."""

    @property
    def child(self) -> str:
        """Return the name of the model's child that standardizes."""
        return child_name(self.what, self.name)

    # Attaching

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._part = None
        if not (self.center or self.scale):
            return
        for other in callbacks_of(trainer):
            if type(other) is type(self) and other is not self and other.module == self.module and self._overlaps(other):
                msg = f"{other!r} and {self!r} both standardize the {self.what}s of the model. Keep one."
                raise TrickConflictError(msg)
        try:
            self._attach(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):
                raise
            self._patches.wrap(pl_module, "configure_model", lambda configure: partial(self._configure, pl_module, configure))
        if trainer.strategy.restore_checkpoint_after_setup:
            self._patches.wrap(trainer.strategy, "load_checkpoint", lambda load: partial(self._load, pl_module, load))
        if stage == "fit":
            self._patches.also(prepare(trainer, partial(self._start, trainer, pl_module), turn=1))

    def _overlaps(self, other: StandardizingTrick) -> bool:
        """Tell whether another of the same kind, on the same module, would change the same tensor."""
        return True

    def _configure(self, module: LightningModule, configure_model: Callable[[], None]) -> None:
        configure_model()
        if self._part is None:
            self._attach(module)

    def _attach(self, module: LightningModule) -> None:
        self._part = attach(submodule(module, self.module, trick=repr(self)), self.child, self.kind(self.settings))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    # Measuring

    @property
    def _waits(self) -> bool:
        return self._part is not None and self._part.statistics is None

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure when the training data are loaded, and before any other callback is told that training starts."""
        if self._waits:
            _measure(trainer, module, [each for each in callbacks_of(trainer) if isinstance(each, StandardizingTrick) and each._waits])
        if self._part is not None:
            self._part.reached = False
        self._checked = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if self._part is not None and not self._checked:
            self._check(pl_module)
            self._checked = True

    def _check(self, module: LightningModule) -> None:
        """Check, after the first step, that training goes through the part."""
        if self._part is not None and not self._part.reached:
            owner = f"{self.module!r}" if self.module else type(module).__name__
            msg = (
                f"{self!r} acts in `forward` of {owner}, and `training_step` did not call it. Call `self(x)` there rather than parts of "
                "the model, or name by `module` the part that is called."
            )
            raise TrickError(msg)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._warn()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn()

    def _warn(self) -> None:
        if self._part is not None and self._part.mean is None:
            rank_zero_warn(f"{self!r} has no statistics before a fit, so that nothing is standardized. Load a checkpoint that has some.")

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})

    @override
    def _record(self, checkpoint: dict[str, Any]) -> None:
        if self._part is None or self._part.statistics is None or self._stored(checkpoint) is not None:
            return
        write_change(checkpoint, self.function, self._change(self._part.statistics))

    def _change(self, statistics: StandardizationStatistics) -> dict[str, Any]:
        settings = {name: value for name, value in self.settings.items() if name not in {"per", "dim"}}
        return {"statistics": vars(statistics), **settings, "module": self.module, "name": self.name}

    def _stored(self, checkpoint: Mapping[str, Any]) -> StandardizationStatistics | None:
        """Return the statistics that a checkpoint has for this trick."""
        for function, arguments in read_changes(checkpoint):
            if function == self.function and (arguments["module"], arguments["name"]) == (self.module, self.name):
                return StandardizationStatistics(**arguments["statistics"])
        return None

    def _load(self, module: LightningModule, load: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        """Give the model buffers of the right shapes before a strategy loads into them."""
        file = Path(path, "meta.pt") if Path(path).is_dir() else Path(path)
        if file.is_file():
            self._recall(module, torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        return load(path, *arguments, **options)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._recall(pl_module, checkpoint)

    def _recall(self, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        statistics = self._stored(checkpoint)
        if self._part is None or statistics is None:
            return
        if self._part.mean is None:
            self._part.set_statistics(statistics)
        self._part.statistics = statistics
        self._part.to(module.device)


def child_name(what: str, name: str | None) -> str:
    """Return the name of the model's child that standardizes its inputs, or its targets."""
    return f"{what}_standardization" if name is None else f"{what}_standardization_{name}"


def _measure(trainer: Trainer, module: LightningModule, tricks: list[StandardizingTrick]) -> None:
    """Measure, in one pass over the training data, what several tricks need."""
    limits = [float("inf") if trick.batches == "all" else trick.batches for trick in tricks]
    collectors = [Collector(trick.per, trick.dim, covariance=trick.whitening is not None) for trick in tricks]
    reported, dtypes = time.monotonic(), [torch.float32] * len(tricks)
    with torch.no_grad(), training_pass(trainer, None if max(limits) == float("inf") else int(max(limits))) as batches:
        for index, batch in enumerate(batches):
            moved = move_batch(trainer, module, batch)
            for i, (trick, collector) in enumerate(zip(tricks, collectors, strict=True)):
                if index < limits[i]:
                    values = tensor_in(moved, trick.item)
                    dtypes[i] = values.dtype
                    collector.add(values)
            if time.monotonic() - reported > _PATIENCE:
                reported = time.monotonic()
                rank_zero_info(f"Statistics for standardization: {index + 1} batches measured.")
    for trick, collector, dtype in zip(tricks, collectors, dtypes, strict=True):
        statistics = collector.pooled()
        assert trick._part is not None
        trick._part.set_statistics(statistics, device=module.device, dtype=dtype)
        constant = float((statistics.variance == 0).sum())
        quantities = {f"{trick.log_prefix}/batches": float(collector.batches), f"{trick.log_prefix}/constant": constant}
        for logger in trainer.loggers:
            logger.log_metrics(quantities, step=trainer.global_step)
