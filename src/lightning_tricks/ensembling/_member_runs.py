"""The fits that train the members of an ensemble, one after another or all at once, each from its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_tricks._core.draws import fold
from lightning_tricks._core.epochs import SeededEpochs
from lightning_tricks._core.lightning import (
    LightningModule,
    Trainer,
    callbacks_of,
    defines,
    is_data_module,
    is_lightning_module,
    is_trainer,
    isolate_rng,
    override,
    rank_zero_info,
    trainer_class,
)
from lightning_tricks._core.loaders import untouched
from lightning_tricks._core.seeding import seeded
from lightning_tricks._core.surgery import Patches
from lightning_tricks.ensembling._bagging import bagged, draw_bag, outside, predict_rows
from lightning_tricks.ensembling._member_files import MemberFiles, tensors_of
from lightning_tricks.ensembling._packing import CannotPackError, PackedLoader, PackedMembers, check_packable
from lightning_tricks.ensembling._packing_trial import time_steps
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError, UnsupportedStrategyError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MakeModule", "MakeTrainer", "MemberRuns"]

MakeModule = Callable[[], LightningModule] | Callable[[int], LightningModule]
MakeTrainer = Callable[[], Trainer] | Callable[[int], Trainer] | Mapping[str, Any]

_SHARDING = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
_PACKED, _PREDICTING = 0x9AC6ED, 0x00B
_ROUNDS, _STEPS = 2, 10  # in which both ways take turns, and that a trial takes


class _Watched(SeededEpochs):
    """Checks, before the first step, that what is being trained can be stored and can predict."""

    def __init__(self, seed: int, path: Path, check: Callable[[Trainer, LightningModule], None]) -> None:
        super().__init__(seed, path)
        self._check = check

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolate_rng():
            self._check(trainer, pl_module)


class MemberRuns:
    """Trains members from a user's functions and data.

    Args:
        make_module: Makes members.
        make_trainer: Makes their Trainers, or what they are made of.
        files: Where finished members are kept.
        datamodule: The data module, or the loader of training data.
        validation: The loader of validation data.
        members: Their number.
        bootstrap: Whether each trains on a resample.
        seed: The ensemble's.
        alone: Whether other processes cannot reach the files.
    """

    def __init__(
        self,
        make_module: MakeModule,
        make_trainer: MakeTrainer,
        files: MemberFiles,
        *,
        datamodule: Any,
        validation: Any,
        members: int,
        bootstrap: bool,
        seed: int,
        alone: bool,
    ) -> None:
        self.members, self.bootstrap, self.seed = members, bootstrap, seed
        self._files, self._data, self._validation, self._alone = files, datamodule, validation, alone
        self._loader: Any = None  # of the user's training data, as it was used last
        self._make_trainer = make_trainer if isinstance(make_trainer, Mapping) else _numbered("trainer", make_trainer, "Trainer")
        self._make_module = _numbered("make_module", make_module, "LightningModule")
        with seeded(self._key(0)):
            self.first: LightningModule = self._build(0)

    def choose(self, mode: Literal["auto", "loop", "packed"]) -> Literal["loop", "packed"]:
        """Return how members are to be trained; whatever the user chose, packing is tried once.

        Raises:
            TrickError: If they cannot be packed, and the user chose that.
        """
        if mode == "loop" or (mode == "auto" and self.members == 1):
            return "loop"
        packed = loop = math.inf
        try:
            for _ in range(1 if mode == "packed" else _ROUNDS):  # since other processes may slow down the machine for as long as one
                packed = min(packed, self._time_packed(0 if mode == "packed" else _STEPS))
                loop = min(loop, math.inf if mode == "packed" else self.members * self._time_alone(_STEPS))
        except CannotPackError as error:
            if mode == "packed":
                msg = f"`mode='packed'` must have members that can be trained at once, and {error}. Pass mode='loop' or mode='auto'."
                raise TrickError(msg) from error
            rank_zero_info(f"train_ensemble trains one member after another: {error}.")
            return "loop"
        if mode == "packed":
            return "packed"
        chosen: Literal["loop", "packed"] = "packed" if packed < loop else "loop"
        rank_zero_info(
            f"train_ensemble trains {'all members at once' if chosen == 'packed' else 'one member after another'}: a step of all "
            f"{self.members} takes {1000 * packed:.2f} ms packed, and {1000 * loop:.2f} ms one after another."
        )
        return chosen

    def run(self, mode: Literal["loop", "packed"]) -> list[dict[str, Any]]:
        """Train what is not finished, and return the members' records."""
        unfinished = [member for member in range(self.members) if self._files.record(member) is None]
        if mode == "packed" and unfinished:
            self._run_packed(unfinished)
        for member in unfinished if mode == "loop" else ():
            self._run_alone(member)
        records = [self._files.record(member) for member in range(self.members)]
        return [record for record in records if record is not None]

    def rebuild(self, member: int, state: Mapping[str, Tensor]) -> LightningModule:
        """Make a member anew, with trained weights.

        Raises:
            CheckpointError: If they do not fit.
        """
        with seeded(self._key(member)):
            module = self._build(member)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            msg = (
                f"The weights of member {member} must fit what `make_module` makes, so that it can be made again. What a callback or "
                f"`setup` does to the model's names, let `make_module` do. {error}"
            )
            raise CheckpointError(msg) from error
        return module

    # One after another

    def _run_alone(self, member: int) -> None:
        with seeded(self._key(member)):
            module, key = self._make(member), self._key(member)
            trainer = self._trainer(member, module)

            def check(trainer: Trainer, module: LightningModule) -> None:
                self._check(trainer, member, tensors_of(module))

            callbacks_of(trainer).insert(0, _Watched(key, self._files.progress(member), check))
            self._fit(trainer, module, lambda loader: self._drawn(loader, member), self._files.progress(member))
            self._finish(trainer, member, tensors_of(module), _metrics(trainer))

    def _time_alone(self, steps: int) -> float:
        with seeded(self._key(0)):
            module = self._make(0)
            trainer = self._trainer(0, module)
            return time_steps(trainer, lambda: self._fit(trainer, module, lambda loader: self._drawn(loader, 0)), steps)

    def _drawn(self, loader: Any, member: int) -> Any:
        return bagged(loader, self._key(member)) if self.bootstrap else loader

    # All at once

    def _run_packed(self, unfinished: list[int]) -> None:
        trainer, packed = self._packed()
        path = self._files.progress("packed")

        def check(trainer: Trainer, module: Any) -> None:
            self._check(trainer, 0, module.state_of(0))

        callbacks_of(trainer).insert(0, _Watched(fold(self.seed, _PACKED), path, check))
        with seeded(fold(self.seed, _PACKED)):
            try:
                self._fit(trainer, packed, lambda loader: self._packed_loader(loader, trainer), path)
            except CannotPackError as error:
                msg = f"Members cannot be trained at once any longer: {error}. Use another folder, and pass mode='loop'."
                raise TrickError(msg) from error
            for member in unfinished:
                self._finish(trainer, member, packed.state_of(member), packed.logs.metrics(member))
        path.unlink(missing_ok=True)

    def _time_packed(self, steps: int) -> float:
        trainer, packed = self._packed()
        with seeded(fold(self.seed, _PACKED)):
            return time_steps(trainer, lambda: self._fit(trainer, packed, lambda loader: self._packed_loader(loader, trainer)), steps)

    def _packed(self) -> tuple[Trainer, PackedMembers]:
        members = []
        for member in range(self.members):
            with seeded(self._key(member)):
                members.append(self._build(member))
        trainer = self._trainer(0, members[0])
        check_packable(members, trainer, self._data)
        return trainer, PackedMembers(members)

    def _packed_loader(self, loader: Any, trainer: Trainer) -> PackedLoader:
        keys = [self._key(member) for member in range(self.members)]
        return PackedLoader([self._drawn(loader, member) for member in range(self.members)], keys, lambda: trainer.current_epoch)

    # Both

    def _key(self, member: int) -> int:
        return fold(self.seed, member)

    def _fit(self, trainer: Trainer, module: LightningModule, drawn: Callable[[Any], Any], progress: Path | None = None) -> None:
        def load(loader: Any) -> Any:
            self._loader = loader
            return drawn(loader)

        checkpoint = str(progress) if progress is not None and progress.is_file() else None
        if not is_data_module(self._data):
            with untouched([self._data]):
                trainer.fit(module, load(self._data), self._validation, ckpt_path=checkpoint)
            return
        patches = Patches()
        patches.wrap(self._data, "train_dataloader", lambda own: lambda: load(own()))
        try:
            trainer.fit(module, datamodule=self._data, ckpt_path=checkpoint)
        finally:
            patches.undo()

    def _check(self, trainer: Trainer, member: int, state: Mapping[str, Tensor]) -> None:
        module = self.rebuild(member, state)
        if self.bootstrap:
            predict_rows(trainer, module, self._loader, self._outside(member), batches=1)

    def _outside(self, member: int) -> Tensor:
        size = len(self._loader.dataset)
        return outside(draw_bag(self._key(member), size), size)

    def _finish(self, trainer: Trainer, member: int, state: Mapping[str, Tensor], metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            found, record = None, {"metrics": metrics, "seed": self._key(member)}
            if self.bootstrap:
                rows, module = self._outside(member), self.rebuild(member, state)
                with seeded(fold(self._key(member), _PREDICTING)):
                    found = {"rows": rows, "predictions": predict_rows(trainer, module, self._loader, rows)}
                record["examples"] = len(self._loader.dataset)
            self._files.finish(member, state, found, record)
        trainer.strategy.barrier()

    def _make(self, member: int) -> LightningModule:
        module: LightningModule = self._make_module(member)
        if not is_lightning_module(module):
            msg = f"`make_module` must return a new LightningModule, and returned a {type(module).__name__}."
            raise ArgumentError(msg)
        first: LightningModule | None = vars(self).get("first")
        trained = {id(parameter) for parameter in first.parameters() if parameter.requires_grad} if first is not None else set()
        shared = next((name for name, parameter in module.named_parameters() if id(parameter) in trained), None)
        if module is first or shared:
            what = "the same one twice" if module is first else f"two that share {shared!r}"
            msg = f"`make_module` must return a new LightningModule for each member, and returned {what}. Make everything in it anew."
            raise ArgumentError(msg)
        return module

    def _build(self, member: int) -> LightningModule:
        """Make a member with all its layers."""
        module = self._make(member)
        if defines(module, "configure_model"):
            module.configure_model()
        return module

    def _trainer(self, member: int, module: LightningModule) -> Trainer:
        if isinstance(self._make_trainer, Mapping):
            trainer = trainer_class(module)(**deepcopy(dict(self._make_trainer)))
        else:
            trainer = self._make_trainer(member)
        if not is_trainer(trainer) or trainer.state.fn is not None:
            found = "one that was used before" if is_trainer(trainer) else f"a {type(trainer).__name__}"
            msg = f"`trainer` must return a new Trainer for each member, and returned {found}."
            raise ArgumentError(msg)
        sharding = _SHARDING & {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if sharding:
            msg = f"train_ensemble stores whole members, and {min(sharding)} spreads their weights over ranks. Use DDP, or one device."
            raise UnsupportedStrategyError(msg)
        if trainer.world_size > 1 and self._alone:
            msg = f"`folder` must be a folder that all ranks reach, since the Trainer has {trainer.world_size} of them, got None."
            raise ArgumentError(msg)
        return trainer


def _numbered(name: str, make: Any, kind: str) -> Callable[[int], Any]:
    """Return a function of the member's number, whether the user's takes it or not."""
    if not callable(make) or isinstance(make, nn.Module):
        arguments = ", or a dict of a Trainer's arguments" if kind == "Trainer" else ""
        msg = f"`{name}` must be a function that makes a new {kind}, such as `lambda: {kind}(…)`{arguments}, got a {type(make).__name__}."
        raise ArgumentError(msg)
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    takes = any(each.kind in kinds and each.default is Parameter.empty for each in signature(make).parameters.values())
    return make if takes else lambda _: make()


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
