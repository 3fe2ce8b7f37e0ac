"""The callback behind every average: it decides when to update, which weights the model holds, and what a checkpoint keeps."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_device, check_patterns, check_precise_dtype
from lightning_tricks._core.clock import after_each_engine_step, after_each_step, plain_duration
from lightning_tricks._core.evaluation import validate_aside
from lightning_tricks._core.exhibits import Exhibits
from lightning_tricks._core.lightning import (
    STEP_OUTPUT,
    LightningModule,
    Trainer,
    callbacks_of,
    defines,
    logs_now,
    override,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tricks._core.selection import select_parameters
from lightning_tricks._core.state_dicts import write_parts
from lightning_tricks._core.strategies import engine_of, moved_by, refuse_unreachable_parameters, return_to_shards, writes_own_files
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.swapping import SwappingTrick
from lightning_tricks.averaging._averages import Averages
from lightning_tricks.averaging._cadence import Cadence
from lightning_tricks.averaging._records import pack, unpack, unpack_absent
from lightning_tricks.averaging._roster import Roster, list_places, some
from lightning_tricks.averaging._tracks import Storage, Track
from lightning_tricks.errors import NothingMatchedError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["WeightAverage"]


class WeightAverage(SwappingTrick):
    """A running average of the weights; subclasses say by how much an update moves it."""

    def __init__(
        self,
        *,
        start: int | str,
        every: int | str,
        buffers: Literal["average", "copy", "keep"],
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        where: str | Sequence[str],
        exclude: str | Sequence[str],
        evaluate: bool | Literal["both"],
        name: str | None,
        stop: int | str | None = None,
    ) -> None:
        super().__init__(name)
        self._cadence = Cadence(start, every, stop)
        self.start, self.every = plain_duration(start), plain_duration(every)
        self.buffers = check_choice("buffers", buffers, ("average", "copy", "keep"))
        self._storage = Storage(check_device(device), check_precise_dtype(dtype))
        self.device = None if self._storage.device is None else str(self._storage.device)
        self.dtype = None if self._storage.dtype is None else str(self._storage.dtype).removeprefix("torch.")
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.evaluate = check_choice("evaluate", evaluate, (True, False, "both"))
        self._averages: Averages | None = None  # of the model trained last
        self._roster: Roster | None = None  # during a fit
        self._patches, self._lasting = Patches(), Patches()  # the latter until the next setup, since models are saved after a fit, too
        self._hooks: list[RemovableHandle] = []
        self._hooked: list[Optimizer] = []
        self._was_inside: bool | None = None  # before the present evaluation; None where there is none of ours

    # What a subclass says

    @abstractmethod
    def _update(self, track: Track) -> None:
        """Update a track that is due."""

    @abstractmethod
    def _quantities(self, track: Track) -> dict[str, float]:
        """Return what to log, by name."""

    def _resolve(self, trainer: Trainer) -> None:
        """Convert durations to steps, once the Trainer knows its data."""
        self._cadence.resolve(trainer)

    # What a user asks

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with averaged weights, as copies; the raw ones where no average has begun.

        Raises:
            TrickError: If no fit has begun.
        """
        return self._seen().state_dict(averaged=True)

    def raw_state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the weights that training has reached, as copies, during and after a fit.

        Raises:
            TrickError: If no fit has begun.
        """
        return self._seen().state_dict(averaged=False)

    def _seen(self) -> Averages:
        if self._averages is None:
            msg = f"{self!r} has seen no model yet. Ask for its weights after `trainer.fit` has begun."
            raise TrickError(msg)
        return self._averages

    @override
    def _exhibits(self) -> Exhibits:
        averaged = self.evaluation_owner and self._averages is not None and self._averages.begun
        return Exhibits(asides=("raw",) if self.evaluate == "both" else (), weights="averaged" if averaged else None)

    @property
    @override
    def evaluation_owner(self) -> bool:
        return self.evaluate is not False

    @property
    @override
    def follows_weights(self) -> bool:
        return True

    @property
    @override
    def replaces_statistics(self) -> bool:
        return self.evaluation_owner and self.buffers != "copy"

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_unreachable_parameters(trainer, repr(self))
        if stage == "fit":
            try:
                self._select(pl_module)
            except NothingMatchedError:
                if not defines(pl_module, "setup", "configure_model"):  # which build layers later; `on_fit_start` looks again
                    raise
            self._take_up(pl_module)
            if self.evaluation_owner:
                self._patches.wrap(trainer.strategy, "lightning_module_state_dict", partial(self._deploying, trainer))
        else:
            self._patches.wrap(trainer.strategy, "setup", lambda own: partial(self._set_up, own))
        self._lasting.undo()
        if writes_own_files(trainer):
            self._lasting.wrap(trainer.strategy, "save_checkpoint", partial(self._saving, trainer))
        if self.evaluate == "both" and stage in {"fit", "validate"}:
            loop = trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else trainer.validate_loop
            self._patches.wrap(loop, "run", lambda run: partial(self._run_twice, trainer, loop, run))

    def _set_up(self, own: Callable[[Trainer], None], trainer: Trainer) -> None:
        """Let the strategy set itself up, which under DDP writes rank zero's weights to all: they are the same."""
        averages = self._averages
        untouched = averages is not None and averages.untouched
        own(trainer)
        if averages is not None and untouched:
            averages.mark()

    def _take_up(self, module: LightningModule) -> None:
        """Go on where an earlier fit of this model ended, or start anew."""
        self._cadence.ended_epoch = -1
        if self._averages is None or self._averages.module is not module:
            self._averages = Averages(module, self._storage)
        self._forget_if_changed("this fit starts a new average")
        self._averages.put_raw()

    def _forget_if_changed(self, consequence: str) -> None:
        averages = self._seen()
        if averages.tracks and not averages.untouched:
            rank_zero_info(f"The weights that {self!r} averages have been changed since the Trainer returned the model: {consequence}.")
            averages.tracks = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moved = set().union(*map(moved_by, trainer.optimizers))
        if not any(id(parameter) in moved for parameter in self._select(pl_module).values()):
            msg = (
                f"{self!r} averages once per optimizer step, and no optimizer of {type(pl_module).__name__} has any parameter that it "
                "selects. Return one from `configure_optimizers`, or remove the callback."
            )
            raise TrickError(msg)

    def _select(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return_to_shards(module)
        return select_parameters(module, self.where, self.exclude, trick=repr(self))

    # During a fit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resolve(trainer)
        lost, joined = self._enroll(trainer, pl_module)
        if lost:
            rank_zero_warn(f"{self!r} no longer selects {some(lost)}; their averages are dropped.")
        if joined:
            rank_zero_warn(f"{self!r} had no average of {some(joined)}; it starts from the present weights.")

    def _enroll(self, trainer: Trainer, module: LightningModule) -> tuple[list[str], list[str]]:
        """Follow what is to be averaged now, and the optimizers that there are now."""
        self._unhook()
        averages = self._seen()
        places = list_places(module, self._select(module), self.where, self.exclude, self.buffers)
        self._roster = Roster(trainer.optimizers, self._storage, steps=trainer.global_step)
        changes = self._roster.enroll(places, averages.tracks)
        averages.tracks = self._roster.tracks
        self._hooked = list(trainer.optimizers)
        if (engine := engine_of(trainer)) is not None:
            self._hooks += after_each_engine_step(engine, partial(self._stepped, trainer, 0), before=self._roster.admit)
        for i, optimizer in enumerate(self._hooked) if engine is None else ():
            self._hooks += after_each_step(optimizer, partial(self._stepped, trainer, i), before=self._roster.admit)
        self._begin_where_due(trainer.current_epoch, trainer.current_epoch)
        return changes

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enroll(trainer, pl_module)  # layers may have been replaced

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        optimizers = trainer.optimizers
        if len(optimizers) != len(self._hooked) or any(new is not old for new, old in zip(optimizers, self._hooked, strict=True)):
            self._enroll(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._roster is not None:
            self._roster.admit()

    def _stepped(self, trainer: Trainer, optimizer: int) -> None:
        for track in self._seen().tracks:
            if optimizer in track.optimizers and not track.inside:
                track.steps += 1
                if self._cadence.due_after_step(track, trainer.current_epoch):
                    self._update(track)
        self._begin_where_due(trainer.current_epoch, trainer.current_epoch + int(trainer.is_last_batch))

    def _begin_where_due(self, epoch: int, first: int) -> None:
        """Begin tracks that are due, with the epoch whose steps are the first to be averaged."""
        for track in self._seen().tracks:
            if self._cadence.begins(track, epoch):
                track.begin(first)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        self._catch_up(trainer)
        if logs_now(trainer) and (track := next((track for track in self._seen().tracks if track.begun is not None), None)):
            pl_module.log_dict({f"{self.log_prefix}/{key}": value for key, value in self._quantities(track).items()})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer)  # of an epoch cut short

    def _catch_up(self, trainer: Trainer) -> None:
        if trainer.is_last_batch:  # before the validation that follows, unlike `on_train_epoch_end`
            self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        if self._cadence.ends_epoch(trainer.current_epoch):
            for track in self._seen().tracks:
                if self._cadence.due_after_epoch(track, trainer.current_epoch):
                    self._update(track)

    @override
    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        self._unhook()
        if self.evaluation_owner:
            self._seen().put_average()
        self._seen().mark()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unhook()
        if self._averages is not None and self._averages.module is pl_module and trainer.state.fn == "fit":
            self._was_inside = False
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unhook()
        self._patches.undo()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked, self._roster = [], None

    # During an evaluation, inside a fit or on its own

    @override
    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        averages = self._averages
        if averages is None or averages.module is not module:
            return
        if trainer.state.fn != "fit":
            self._forget_if_changed("it is evaluated as it is")
        self._was_inside = averages.inside
        if self.evaluation_owner:
            averages.put_average()

    @override
    def _leave(self) -> None:
        if self._was_inside is not None:
            if not self._was_inside:
                self._seen().put_raw()
            self._seen().mark()
        self._was_inside = None

    def _run_twice(self, trainer: Trainer, loop: Any, run: Callable[[], Any]) -> Any:
        """Validate the raw weights aside, then the average as always."""
        averages = self._averages
        if averages is None or not averages.begun or not self._acts_on(trainer) or trainer.sanity_checking:
            return run()
        if trainer.state.fn == "fit" or averages.untouched:
            was_inside = averages.inside
            averages.put_raw()
            validate_aside(trainer, loop, "raw")
            if was_inside:
                averages.put_average()
            averages.mark()
        return run()

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        averages = self._averages
        if averages is None or averages.module is not pl_module:
            return
        own_files = writes_own_files(trainer)
        deployed = self.evaluation_owner and not own_files
        if deployed and not averages.cut_in_runs:
            checkpoint["state_dict"] = averages.replaced(checkpoint["state_dict"], averages.averaged())
        entry = pack(averages, checkpoint, self.state_key, deployed=deployed, own_files=own_files)
        write_entry(checkpoint, self.state_key, repr(self), {**entry, "ended_epoch": self._cadence.ended_epoch})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fitting = trainer.state.fn == "fit"
        entry = read_entry(checkpoint, self.state_key)
        self._averages = averages = Averages(pl_module, self._storage)
        raw = {} if entry is None else unpack(entry, checkpoint, averages, trainer.ckpt_path, self.state_key)
        self._cadence.ended_epoch = -1 if entry is None else entry["ended_epoch"]
        if self.evaluation_owner and not fitting:
            averages.adopt(raw)
            averages.put_average()
            return
        present = [callback.state_key for callback in callbacks_of(trainer)]
        absent = unpack_absent(checkpoint, pl_module, present, trainer.ckpt_path) if fitting else {}
        for parts in (*absent.values(), raw):
            write_parts(pl_module, parts)
        if fitting and entry is None:
            rank_zero_info(f"{self!r} found no average of its own in the checkpoint; it starts from the checkpoint's weights.")
        if absent:
            rank_zero_warn(
                f"The checkpoint was made with {next(iter(absent))}, which this Trainer lacks: training goes on from its raw weights, "
                "and its average is dropped. Add the callback to keep it."
            )
        averages.mark()

    def _deploying(self, trainer: Trainer, state_dict: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def deployed() -> dict[str, Any]:
            averages = self._averages
            if averages is None or not self._acts_on(trainer):
                return state_dict()
            if averages.cut_in_runs:  # the strategy alone can put wholes together
                with averages.holding(average=True):
                    return state_dict()
            return averages.replaced(state_dict(), averages.averaged())

        return deployed

    def _saving(self, trainer: Trainer, save: Callable[..., None]) -> Callable[..., None]:
        """Let DeepSpeed, which writes the weights itself and starts from those when it resumes, write the raw ones."""

        def saved(*arguments: Any, **options: Any) -> None:
            if self._averages is None or not self._acts_on(trainer):
                save(*arguments, **options)
                return
            with self._averages.holding(average=False):
                save(*arguments, **options)

        return saved

    def _acts_on(self, trainer: Trainer) -> bool:
        """Tell whether a Trainer, which may have gone on without this callback after an exception, trains the model averaged here."""
        return self in callbacks_of(trainer) and self._averages is not None and self._averages.module is trainer.lightning_module
