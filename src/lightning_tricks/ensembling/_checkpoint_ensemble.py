"""Checkpoint ensembles: the best or the latest weights of an ordinary run, evaluated together.

Every run passes through models that are about as good as its last and make different mistakes. To keep some of them costs no training
and changes none.

Source: H. Chen, S. Lundberg and S.-I. Lee, "Checkpoint Ensembles: Ensemble Methods from a Single Training Process", arXiv:1710.03282,
2017.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checks import check_choice
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, override, rank_zero_warn
from lightning_tricks.ensembling._counting import CountingEnsemble
from lightning_tricks.ensembling._cyclic_rates import CyclicRates
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_tricks.ensembling._combining import Combine, Output
    from lightning_tricks.ensembling._store import Member

__all__ = ["CheckpointEnsemble", "is_better"]


def is_better(score: float, other: float, mode: Literal["min", "max"]) -> bool:
    """Tell whether a score is better than another."""
    return score < other if mode == "min" else score > other


class CheckpointEnsemble(CountingEnsemble):
    """Keep the best or the latest weights of a run, and evaluate them as one ensemble.

    Of the weights ``w_1, …, w_n`` after each `every`, the members are the k with the best values of `monitor`, or without one the
    latest, ``w_{n−k+1}, …, w_n``.

    Reach for it when training shall stay as it is: it costs k files and, in evaluation, k forward passes. Members of one run with a
    falling learning rate differ little; `SnapshotEnsemble` and `FastGeometricEnsemble` let them differ more.

    Args:
        members: Number k of members.
        monitor: A metric that the module logs, such as ``"val_loss"``, by which the best are chosen; None = the latest.
        mode: Whether the best have the lowest or the highest values of it.
        every: Duration between candidates. With a `monitor` that is validated, these are the weights at the first validation after it;
            without one, in epochs, they are taken at the end of an epoch and before its validation.
        combine: What `forward` returns in evaluation: ``"probabilities"`` the logarithm of the members' mean probabilities, whose
            argmax and cross-entropy are the ensemble's; ``"logits"`` the mean logits; ``"vote"`` the majority vote, in which the mean
            probability decides between equals; ``"mean"`` the mean, for regression.
        output: What `forward` returns: ``"logits"`` or ``"probabilities"``.
        class_dim: Dimension of the classes in it. If it has size 1, or there is none, the logit is that of a sigmoid.
        target: Name of the submodule that answers for all members, where the steps call that in place of the module; None = the
            module itself.
        weights: ``"current"`` makes members of the weights as they are trained; ``"average"`` of those that an averaging callback in the
            list keeps, which must not evaluate itself: ``EMA(evaluate=False)``.
        refresh_batch_norm: Number of training batches of each rank, or ``"all"``, over which BatchNorm's statistics are measured for each
            member as it is taken; None = those of training. Averaged weights need it.
        evaluate: Whether validation, test and predict use the ensemble. ``"members"`` also validates each member, and logs its metrics
            under ``member_0/``, ..., where checkpointing and early stopping do not see them.
        measure: Whether to log `metrics.EnsembleMeasures` in validation and test.
        item: Index or key of the labels in a batch; None = the second of a tuple or list, or ``"labels"``, ``"label"``, ``"targets"``,
            ``"target"`` or ``"y"`` of a dict, if that fits the predictions.
        memory: ``"cpu"`` keeps members in main memory, too; ``"disk"`` reads them for each prediction.
        dirpath: Folder for members; None = ``checkpoint_ensemble`` (with a `name`, ``checkpoint_ensemble_<name>``) beside Lightning's
            ``checkpoints``. All ranks must reach it.
        name: Tells several callbacks apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `target` names no module, or there is no BatchNorm to refresh.
        TrickConflictError: At setup, if another callback also replaces what evaluation uses, or several average.
        TrickError: At setup, with ``weights="average"`` and no callback that averages; when training starts, if the fit's length is
            needed and unknown; when a candidate is due, if `monitor` is not among the logged metrics; in an evaluation, if `target` is
            never called, or returns anything but a tensor.
        UnsupportedStrategyError: At setup, under FSDP1 and DeepSpeed.
        UnsupportedOptimizerError: When training starts, if an optimizer is no ``torch.optim.Optimizer``.
        CheckpointError: On loading a checkpoint, if a member's file is missing, altered, or of another model.

    Note:
        With a `monitor`, validation inside the fit evaluates the weights as they are trained, since the metric must be theirs; the
        ensemble answers in ``trainer.validate``, ``test`` and ``predict``. Without one, it answers inside the fit, too. A candidate
        replaces the worst member only if it is strictly better; one whose metric is NaN never becomes a member. The metric's value on
        rank zero decides for all: log it with ``sync_dist=True``.

        The module always holds the weights of training, and so does ``checkpoint["state_dict"]``; the checkpoint names the members'
        files with their digests. A member that is replaced is deleted once no checkpoint of the run names it. `to_ensemble` makes one
        module of the members.

        Works on a single device, under DDP, under FSDP2, where each rank writes and lends its own shards, and with ``torch.compile``.

    References:
        H. Chen, S. Lundberg and S.-I. Lee, "Checkpoint Ensembles: Ensemble Methods from a Single Training Process", arXiv:1710.03282,
        2017. There, the metric is the validation loss and candidates come from each epoch.

    Example:
        >>> CheckpointEnsemble(3, monitor="val_acc", mode="max")
        CheckpointEnsemble(members=3, monitor='val_acc', mode='max')
    """

    def __init__(
        self,
        members: int = 5,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every: int | str = "1 epoch",
        combine: Combine = "probabilities",
        output: Output = "logits",
        class_dim: int = -1,
        target: str | None = None,
        weights: Literal["current", "average"] = "current",
        refresh_batch_norm: int | Literal["all"] | None = None,
        evaluate: bool | Literal["members"] = True,
        measure: bool = True,
        item: int | str | None = None,
        memory: Literal["cpu", "disk"] = "cpu",
        dirpath: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            members=members,
            combine=combine,
            output=output,
            class_dim=class_dim,
            target=target,
            weights=weights,
            refresh_batch_norm=refresh_batch_norm,
            evaluate=evaluate,
            measure=measure,
            item=item,
            memory=memory,
            dirpath=dirpath,
            name=name,
        )
        if monitor is not None and not (isinstance(monitor, str) and monitor):
            msg = f"`monitor` must be the name of a logged metric such as 'val_loss', or None for the latest weights, got {monitor!r}."
            raise ArgumentError(msg)
        self.monitor = monitor
        self.mode = check_choice("mode", mode, ("min", "max"))
        self._every, self.every = Duration.parse("every", every, least=1), plain_duration(every)
        self._every_steps: int | None = None  # None where the duration is in epochs
        self._rates = CyclicRates()
        self._latest = 0  # steps or epochs at the latest candidate

    @override
    def _resolve(self, trainer: Trainer) -> None:
        self._every_steps = None if self._every.unit == "epochs" else max(1, self._every.steps("every", trainer))

    # When there is a candidate

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.monitor is not None:  # which the module may log at the end of an epoch, after callbacks have acted
            self._patches.wrap(pl_module, "on_train_epoch_end", lambda end: partial(self._end_epoch, trainer, pl_module, end))

    def _end_epoch(self, trainer: Trainer, module: LightningModule, end: Callable[[], None]) -> None:
        end()
        if not trainer.enable_validation:
            self._consider(trainer, module, ended=True)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if self.monitor is None:
            self._consider(trainer, pl_module, ended=trainer.is_last_batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.monitor is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._consider(trainer, pl_module, ended=trainer.is_last_batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None:
            self._consider(trainer, pl_module, ended=True)  # of an epoch that is cut short

    def _consider(self, trainer: Trainer, module: LightningModule, *, ended: bool) -> None:
        """Take the weights as they are for a candidate, if one is due."""
        now = self._rates.steps if self._every_steps is not None else trainer.current_epoch + int(ended)
        if now - self._latest < (self._every_steps or self._every.amount):
            return
        self._latest = now
        facts = {"step": self._rates.steps, "epoch": trainer.current_epoch}
        if self.monitor is None:
            self._collect(trainer, module, facts)
            return
        score = float(trainer.strategy.broadcast(self._score(trainer)))
        if math.isnan(score):
            rank_zero_warn(f"{self!r} passes over the weights after {self._rates.steps} steps: {self.monitor!r} is NaN.")
        elif len(self._members) < self.members or is_better(score, self._score_of(self._surplus(self._members)), self.mode):
            self._collect(trainer, module, {**facts, "monitor": self.monitor, "score": score})

    def _score(self, trainer: Trainer) -> float:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            found = ", ".join(map(repr, sorted(metrics))) or "none"
            msg = (
                f"`monitor={self.monitor!r}` must be a metric that the module logs, and those logged are {found}. Log it, or name another."
            )
            raise TrickError(msg)
        return float(metrics[self.monitor])

    def _score_of(self, member: Member) -> float:
        """Return a member's score; the worst for one that was chosen by another metric, before the run was resumed."""
        score = member.facts.get("score") if member.facts.get("monitor") == self.monitor else None
        return (math.inf if self.mode == "min" else -math.inf) if score is None else float(score)

    @override
    def _surplus(self, members: list[Member]) -> Member:
        if self.monitor is None:
            return members[0]
        return (max if self.mode == "min" else min)(members, key=self._score_of)  # of equal ones the oldest

    @override
    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        if self.monitor is None or trainer.state.fn != "fit":
            super()._enter(trainer, module)

    # Checkpoints

    @override
    def _pack(self) -> dict[str, Any]:
        return {**super()._pack(), "latest": self._latest}

    @override
    def _unpack(self, entry: Mapping[str, Any]) -> None:
        super()._unpack(entry)
        self._latest = int(entry.get("latest", 0))
