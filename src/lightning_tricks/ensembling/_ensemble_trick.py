"""The abstract base of callbacks that collect members while a model trains and evaluate them together."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.tensor import DTensor

from lightning_tricks._core.averages import find_average
from lightning_tricks._core.batch_norms import select_batch_norms
from lightning_tricks._core.batch_statistics import measure_in_training, write_statistics
from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_bool, check_choice, check_count, check_dim, check_item, check_path
from lightning_tricks._core.copies import copy_module
from lightning_tricks._core.evaluation import validate_aside
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
from lightning_tricks._core.state_dicts import write_parts
from lightning_tricks._core.strategies import named_tensors, own_part, plain_name, refuse_strategies, return_to_shards
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.swapping import SwappingTrick
from lightning_tricks.ensembling._answering import Answer
from lightning_tricks.ensembling._arguments import check_batches, check_target
from lightning_tricks.ensembling._combining import Combine, Output, Uncertainty, check_combination
from lightning_tricks.ensembling._ensemble import Ensemble
from lightning_tricks.ensembling._evaluating import Combination, Evaluation
from lightning_tricks.ensembling._exhibits import exhibits_of
from lightning_tricks.ensembling._store import MemberStore, members_folder
from lightning_tricks.errors import NothingMatchedError, TrickError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from lightning_tricks._core.exhibits import Exhibits
    from lightning_tricks.ensembling._store import Facts, Member

__all__ = ["EnsembleTrick"]


class EnsembleTrick(SwappingTrick):
    """Members of an ensemble, collected during a fit, that answer in the model's place when it is evaluated; subclasses say when.

    A subclass calls `_collect` whenever the model, or its average, is to become a member, and overrides `_surplus` if it is not the
    oldest that goes when there are too many. What else it needs to resume goes through `_pack` and `_unpack`.
    """

    def __init__(
        self,
        *,
        members: int,
        combine: Combine,
        output: Output,
        class_dim: int,
        target: str | None,
        weights: Literal["current", "average"],
        refresh_batch_norm: int | Literal["all"] | None,
        evaluate: bool | Literal["members"],
        measure: bool,
        item: int | str | None,
        memory: Literal["cpu", "disk"],
        dirpath: str | os.PathLike[str] | None,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.members = check_count("members", members)
        check_combination(combine, output)
        self.combine, self.output, self.class_dim = combine, output, check_dim("class_dim", class_dim, "the classes")
        self._combination = Combination(self.combine, self.output, self.class_dim)
        self.target = check_target(target)
        self.weights = check_choice("weights", weights, ("current", "average"))
        self.refresh_batch_norm = check_batches(refresh_batch_norm)
        self.evaluate = check_choice("evaluate", evaluate, (True, False, "members"))
        self.measure = check_bool("measure", measure)
        self.item = check_item(item, "to look for labels where they often are")
        self.memory = check_choice("memory", memory, ("cpu", "disk"))
        self.dirpath = check_path("dirpath", dirpath)
        self._module: LightningModule | None = None  # whose members there are
        self._store: MemberStore | None = None
        self._patches, self._lasting = Patches(), Patches()  # the latter until the next setup, since models are saved after a fit, too
        self._answer: Answer | None = None
        self._evaluation: Evaluation | None = None  # while there is one

    # What a subclass says

    def _surplus(self, members: list[Member]) -> Member:
        """Return which member goes, of one more than are kept."""
        return members[0]

    def _quantities(self) -> dict[str, float]:
        """Return what to log while training, by name."""
        return {"members": float(len(self._members))}

    def _pack(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold beside the members: plain data."""
        return {}

    def _unpack(self, entry: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; begin anew if that is nothing."""

    # What a user asks

    def uncertainty(self) -> Uncertainty:
        """Tell how uncertain the latest prediction is, while evaluating: in regression, `total` is the variance of the members.

        Raises:
            TrickError: If no members have predicted in this evaluation.
        """
        predictions = None if self._evaluation is None else self._evaluation.predictions
        if predictions is None:
            msg = f"{self!r} tells the uncertainty of the latest prediction of an evaluation, and members have made none. Predict first."
            raise TrickError(msg)
        return self._combination.uncertainty(predictions)

    def to_ensemble(self) -> Ensemble:
        """Return the members as one module in evaluation mode, of copies of the model, or of its submodule `target`.

        Raises:
            TrickError: If there are none, or the model is spread over ranks.
        """
        members, module = self._members, self._module
        if module is None or not members or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            found = "the model's weights are spread over ranks" if members else "there are none yet"
            msg = f"{self!r} makes one module from its members, and {found}. Load a checkpoint in one process, or train longer."
            raise TrickError(msg)
        copies = []
        for member in members:
            state, twin = self._kept.state_dict(member), copy_module(module)
            own = {name: plain_name(name, compiled=False) for name in twin.state_dict()}
            twin.load_state_dict({name: state[plain] for name, plain in own.items() if plain in state}, strict=False)
            copies.append(self._target_in(twin))
        return Ensemble(copies, combine=self.combine, output=self.output, class_dim=self.class_dim).eval()

    @property
    @override
    def evaluation_owner(self) -> bool:
        return self.evaluate is not False

    @property
    def _kept(self) -> MemberStore:
        assert self._store is not None  # from `setup` on
        return self._store

    @property
    def _members(self) -> list[Member]:
        return [] if self._store is None else self._store.members

    @override
    def _exhibits(self) -> Exhibits:
        return exhibits_of(self._members, [f"member_{i}" for i in range(self.members)] if self.evaluate == "members" else [])

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_strategies(
            trainer,
            repr(self),
            {
                "FSDPStrategy": "it joins parameters to flat ones, in which no member's can be lent (ModelParallelStrategy can)",
                "DeepSpeedStrategy": "its engine gathers and updates weights of its own, in whose place no member's can be lent",
            },
        )
        try:
            self._check_module(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later
                raise
        if self.weights == "average" and stage == "fit":
            find_average(callbacks_of(trainer), trick=repr(self))
        if self._module is not pl_module or self._store is None or (stage == "fit" and trainer.global_step == 0):
            self._begin_anew(trainer, pl_module)
        self._lasting.undo()
        self._lasting.wrap(trainer.strategy, "save_checkpoint", lambda save: partial(self._saving, trainer, save))
        if stage == "fit":
            self._kept.folder = members_folder(trainer, self.dirpath, self.log_prefix)
            if trainer.is_global_zero:
                self._kept.sweep()
        if self.evaluate == "members" and stage in {"fit", "validate"}:
            loop = trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else trainer.validate_loop
            self._patches.wrap(loop, "run", lambda run: partial(self._run_each, trainer, loop, run))

    def _begin_anew(self, trainer: Trainer, module: LightningModule) -> None:
        if self._module is not module:
            self._answer = None
        self._module, self._store = module, MemberStore(members_folder(trainer, self.dirpath, self.log_prefix), self.memory)
        self._unpack({})

    def _check_module(self, module: LightningModule) -> None:
        self._target_in(module)
        if self.refresh_batch_norm is not None:
            select_batch_norms(module, "*", (), trick=repr(self))

    def _target_in(self, module: LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self.target or "")
        except AttributeError as error:
            names = [name for name, _ in module.named_modules() if name]
            found = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            msg = f"`target={self.target!r}` names no module of {type(module).__name__}, whose modules are {found or 'none'}."
            raise NothingMatchedError(msg) from error

    # During a fit

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log_dict({f"{self.log_prefix}/{key}": value for key, value in self._quantities().items()})

    def _collect(self, trainer: Trainer, module: LightningModule, facts: Facts) -> None:
        """Make the model as it is now, or its average, a member; all ranks must call this."""
        with self._as_member(trainer, module):
            self._kept.add(module, trainer, "member", facts)
        self._drop_surplus(trainer)

    def _drop_surplus(self, trainer: Trainer) -> None:
        while len(self._members) > self.members:
            self._kept.drop(self._surplus(self._members), trainer)

    @contextmanager
    def _as_member(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        """Let the module hold, for a moment, what is to be collected."""
        return_to_shards(module)
        own, lent = named_tensors(module), {}
        if self.weights == "average":
            average = find_average(callbacks_of(trainer), trick=repr(self))
            average._catch_up(trainer)
            state = {plain_name(name): value for name, value in average.averaged_state_dict().items()}
            lent = {name: own_part(value) for name, value in state.items() if name in own}
        norms = {} if self.refresh_batch_norm is None else select_batch_norms(module, "*", (), trick=repr(self))
        norms = {name: norm for name, norm in norms.items() if norm.training}  # others are frozen
        statistics = {id(buffer) for norm in norms.values() for buffer in norm.buffers(recurse=False)}
        changing = [name for name, tensor in own.items() if name in lent or id(tensor) in statistics]
        kept = {name: own_part(own[name]).clone() for name in changing}
        try:
            write_parts(module, lent)
            if norms:
                batches = None if self.refresh_batch_norm == "all" else self.refresh_batch_norm
                for name, values in measure_in_training(trainer, module, norms, batches)[0].items():
                    write_statistics(norms[name], *values)
            yield
        finally:
            return_to_shards(module)
            write_parts(module, kept)

    @override
    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the weights that training has reached in the module."""

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._patches.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    # During an evaluation, inside a fit or on its own

    @override
    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.evaluation_owner or self._module is not module:
            return
        self._check_module(module)
        if self._answer is None:  # one for all evaluations, since compiled code knows it
            self._answer = Answer(self._target_in(module), repr(self))
        if not self._members and trainer.state.fn != "fit":
            rank_zero_warn(f"{self!r} has no members of this model, which is evaluated as it is. Pass `ckpt_path`, or fit first.")
        self._evaluation = Evaluation(
            owner=repr(self),
            trainer=trainer,
            answer=self._answer,
            members=self._members,
            lending=self._kept.lending(module, trainer),
            combination=self._combination,
            measures=self._combination.measures() if self.measure else None,
            item=self.item,
        )
        self._evaluation.begin()

    @override
    def _leave(self) -> None:
        if self._evaluation is not None:
            self._evaluation.end()
        self._evaluation = None

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(batch)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(batch)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(batch, labelled=False)

    def _see(self, batch: Any, *, labelled: bool = True) -> None:
        if self._evaluation is not None:
            self._evaluation.see(batch, labelled=labelled)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluation is not None:
            self._evaluation.check_called(self.target)

    def _finish(self, module: LightningModule) -> None:
        if self._evaluation is not None:
            self._evaluation.check_called(self.target)
            values = {f"{self.log_prefix}/{key}": value for key, value in self._evaluation.values().items()}
            module.log_dict(values, sync_dist=True)  # the same on all ranks already

    def _run_each(self, trainer: Trainer, loop: Any, run: Callable[[], Any]) -> Any:
        """Validate each member aside, then all of them together as always."""
        module = self._module
        if self._members and module is trainer.lightning_module and self in callbacks_of(trainer) and not trainer.sanity_checking:
            lending = self._kept.lending(module, trainer)
            try:
                for i, member in enumerate(self._members):
                    lending.hold(member)
                    validate_aside(trainer, loop, f"member_{i}")
            finally:
                lending.hold(None)
        return run()

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._store is not None and self._module is pl_module:
            write_entry(checkpoint, self.state_key, repr(self), {"members": self._kept.entries(), **self._pack()})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        self._begin_anew(trainer, pl_module)
        if entry is None:
            if trainer.state.fn == "fit":
                rank_zero_info(f"{self!r} found no members of its own in the checkpoint, and begins to collect.")
            return
        self._kept.restore(entry["members"], pl_module, trainer)
        self._drop_surplus(trainer)  # of a run with more members
        self._unpack(entry)

    def _saving(self, trainer: Trainer, save: Callable[..., None], checkpoint: Any, filepath: Any, *arguments: Any, **options: Any) -> None:
        if "callbacks" not in checkpoint:  # in a file of weights alone, about which Lightning asks no callback
            self.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
        save(checkpoint, filepath, *arguments, **options)
        entry = read_entry(checkpoint, self.state_key)
        self._kept.saved(filepath, [] if entry is None else entry["members"], trainer)
